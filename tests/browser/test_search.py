"""What the search of the page finds first of ours, by the words that people type."""

import pytest

WORDS = ["speed up", "faster", "fast", "speed", "acceleration", "accelerate", "performance", "optimize", "teacache"]
WORDS += ["cache", "preset"]
OURS = ("Faster Sampling", "Apply ", "Compare Cache", "What Was Skipped", "Load Refrain")


def found(frontend, words):
    """Titles of our nodes that the search shows for these words, the first at the top."""
    frontend.page.mouse.move(700, 850)
    frontend.page.evaluate("() => void app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    box = frontend.page.get_by_placeholder("Add a node")
    box.fill(words)
    options = frontend.page.get_by_role("option")
    options.filter(has_text="Refrain").first.wait_for()
    frontend.page.wait_for_timeout(400)  # the list follows what is typed
    shown = [text.strip() for text in options.all_inner_texts()]
    frontend.page.keyboard.press("Escape")
    box.wait_for(state="hidden")
    return [text.splitlines()[0] for text in shown if text.startswith(OURS)]


@pytest.mark.parametrize("words", WORDS)
def test_cache_preset_is_the_first_of_ours(frontend, words):
    shown = found(frontend, words)
    assert shown[0] == "Faster Sampling", shown
    assert words == "preset" or "Apply First Block Cache" in shown
