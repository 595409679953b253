"""The page for eyes and hands of all kinds, in a real browser."""
import pytest

from core.canvas import COLOURS
from tests.viz.visitor import DRAWN, FITS

pytestmark = pytest.mark.usefixtures("one_thread")

# All text that is seen: [ratio of contrast, its beginning]; the paper is what lies behind it, mixed
CONTRAST = """(() => {
    const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgba = colour => {
        pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
        return [...pen.getImageData(0, 0, 1, 1).data].map(x => x / 255);
    };
    const mix = (over, under, by) => under.map((x, i) => i < 3 ? x + (over[i] - x) * by : 1);
    const ground = node => {
        if (!node) return rgba(getComputedStyle(document.body).backgroundColor);
        const own = rgba(getComputedStyle(node).backgroundColor);
        return mix(own, ground(node.parentElement), own[3]);
    };
    const light = colour => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => sum + share *
        (colour[i] <= 0.04045 ? colour[i] / 12.92 : ((colour[i] + 0.055) / 1.055) ** 2.4), 0);
    const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let text; text = walk.nextNode();) {
        const node = text.parentElement;
        if (!text.data.trim() || !node.checkVisibility() || node.closest("script")) continue;
        const paper = ground(node), style = getComputedStyle(node);
        const ink = mix(rgba(node instanceof SVGElement ? style.fill : style.color), paper,
                        Number(style.opacity));
        const [low, high] = [light(ink), light(paper)].sort((a, b) => a - b);
        found.push([(high + 0.05) / (low + 0.05), text.data.trim().slice(0, 40)]);
    }
    return found;
})()"""


@pytest.mark.parametrize("width", [360, 320])
def test_narrow(page, width):
    page.browser.size(width, 740, mobile=True)
    page.ask("What is it?")
    page.ask("Where is the one that is to the left of the other?")
    page.until(DRAWN.format(2))
    assert page.run(FITS)
    assert page.run("[...document.querySelectorAll('main *')].every(x => !x.checkVisibility() || "
                    "x.closest('.unseen') || x.getBoundingClientRect().right <= innerWidth)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(page, server, scheme):
    server.notes = ["a note"]
    page.drop()
    page.browser.scheme(scheme)
    page.ask("What is it?")
    page.ask("Where?")
    page.ask("  ")                                                       # an error
    page.until(DRAWN.format(2))
    found = page.run(CONTRAST)
    assert len(found) > 60 and any(text.startswith("Error") for _, text in found)
    assert [(ratio, text) for ratio, text in found if ratio < 4.5] == []
    assert page.run("document.getAnimations().length") == 0              # nothing moves or blinks


def test_colours_are_told_apart_by_their_light():
    """So nobody needs to tell hues apart."""
    light = COLOURS.astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (light[8:] > light[:-8]).all() and light[-1] - light[0] > 200


def test_by_keyboard_alone_with_a_focus_that_is_seen(page):
    page.ask("What is it?")
    page.until(DRAWN.format(1))
    page.run("document.activeElement.blur(); scrollTo(0, 0)")
    wanted = """[...document.querySelectorAll('button, input, textarea, canvas, svg')].filter(x =>
        x.checkVisibility() && (x.type !== 'radio' || x.checked)).length"""
    page.run("window.reached = new Set()")
    for _ in range(80):
        page.browser.key("Tab", 9)
        seen = page.run("""(x => { reached.add(x); return x === document.body ||
            x.matches(':focus-visible') && getComputedStyle(x).outlineStyle !== 'none'; })
            (document.activeElement)""")
        assert seen, page.run("document.activeElement.outerHTML")
    reached = "[...reached].filter(x => x.matches('button, input, textarea, canvas, svg')).length"
    assert page.run(reached) == page.run(wanted) > 20


def test_shift_enter_writes_a_line_and_composing_does_not_ask(page, server):
    page.browser.focus("question")
    page.browser.write("One")
    page.browser.key("Enter", 13, "\r", shift=True)
    page.browser.write("two?")
    page.run("document.getElementById('question').dispatchEvent(new KeyboardEvent('keydown', "
             "{ key: 'Enter', isComposing: true, bubbles: true, cancelable: true }))")
    assert server.asked == []
    page.browser.key("Enter", 13, "\r")
    page.until(DRAWN.format(1))
    assert server.asked[0]["question"] == "One\ntwo?"


def test_everything_has_a_name(page):
    page.ask("What is it?")
    page.ask("Where?")
    page.until(DRAWN.format(2))
    nodes = page.browser("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "textbox", "slider", "radio", "checkbox", "image", "group", "list", "region"}
    named = [(node["role"]["value"], node.get("name", {}).get("value", "").strip())
             for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
    assert len(named) > 40 and {role for role, _ in named} > {"textbox", "slider", "image"}
    assert [role for role, name in named if not name] == []
    ids = page.run("[...document.querySelectorAll('[id]')].map(x => x.id)")
    assert len(ids) == len(set(ids))
