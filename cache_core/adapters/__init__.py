"""Translations between the core and the libraries that run models. The core imports nothing from here."""
