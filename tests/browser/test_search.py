"""What the search of the page finds first of ours, by the words that people type."""

import pytest

WORDS = ["speed up", "faster", "speed", "acceleration", "accelerate", "performance", "optimize", "teacache", "cache"]
OURS = ("Cache Preset", "Apply ", "Compare Cache", "Cache Report", "Load Refrain")


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
    return [text for text in shown if text.startswith(OURS)]


@pytest.mark.parametrize("words", WORDS)
def test_cache_preset_is_the_first_of_ours(frontend, words):
    shown = [
        title for title in found(frontend, words) if words != "faster" or not title.startswith("Apply FasterCache")
    ]
    assert shown[0].startswith("Cache Preset"), shown  # what bears the very word in its name is before it
    assert [title for title in shown if title.startswith("Apply First Block Cache")]
