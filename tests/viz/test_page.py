"""The page's conversation in a real browser: against a server of canned answers, and in the end
against the real one with the bundled model."""
import json

import pytest
from PIL import Image

from tests.viz.helpers import SCENE
from tests.viz.stub import TEXT, done, png, sight
from tests.viz.visitor import ASKED, DRAWN, ERROR, FITS, IDLE, MAP, SAID, WHOLE, Page, files
from toy import world as toy
from viz import shots

pytestmark = pytest.mark.usefixtures("one_thread")


# --------------------------------------------------------------------------------------------------
# Pictures

def test_a_picture_dropped_pasted_and_chosen(page, server):
    assert server.pictures == [png()]
    assert page.text("about") == "cat.png"
    assert page.run("document.querySelector('#picture img').alt") == "cat.png"
    server.notes = ["it has <b>transparency</b>"]
    page.run(f"""document.dispatchEvent(new ClipboardEvent("paste", {{ bubbles: true,
        clipboardData: {files("pasted.png", png(8, 8))} }}))""")
    page.until("document.getElementById('about').textContent === 'pasted.png'")
    assert page.text("notes") == "Note: it has <b>transparency</b>"
    page.run(f"""(input => {{ input.files = {files("chosen.png", png(9, 9))}.files;
        input.dispatchEvent(new Event("change")); }})(document.getElementById("file"))""")
    page.until("document.getElementById('about').textContent === 'chosen.png'")
    assert server.pictures == [png(), png(8, 8), png(9, 9)]
    assert page.run("document.getElementById('scene').hidden")


def test_text_is_pasted_as_text(page, server):
    """Even from a spreadsheet, which puts a picture of it beside it."""
    assert page.run(f"""(() => {{
        const clipboardData = {files("table.png", png())};
        clipboardData.setData("text/plain", "a table");
        return document.getElementById("question").dispatchEvent(new ClipboardEvent("paste",
            {{ bubbles: true, cancelable: true, clipboardData }}));
    }})()""")                                                            # left to the browser
    assert page.text("about") == "cat.png" and len(server.pictures) == 1


def test_what_is_no_picture(page, server):
    page.run("""document.body.dispatchEvent(new DragEvent("drop", { bubbles: true,
        cancelable: true, dataTransfer: new DataTransfer() }))""")
    assert "no picture file" in page.text("error")
    server.about = dict(limits=dict(bytes=10))
    page.browser.open(server.url)
    page.browser.drop(png(), "cat.png")
    assert "more than 0 MB" in page.text("error") and len(server.pictures) == 1


def test_the_toy_world_draws_scenes(page, server):
    server.about = dict(toy=True)
    page.browser.open(server.url)
    assert page.text("about") == "cat, red square" and server.pictures[1:] == [b""]
    page.ask("What is it?")
    page.click("New scene")
    page.until("document.querySelectorAll('#turns li').length === 0")     # of another picture
    assert len(server.pictures) == 3


# --------------------------------------------------------------------------------------------------
# Questions and answers

def test_an_answer_comes_piece_by_piece(page, server):
    server.answer = server.held
    page.ask("What is it?", wait=False)
    assert page.run(ASKED) == ["What is it?"] and page.text("question") == ""
    for i in range(len(TEXT)):
        server.go.release()
        page.until(f"{SAID}[0] === {json.dumps(''.join(TEXT[:i + 1]))}")
        assert page.text("spoken") == "" and page.run("!" + IDLE)       # no chatter word by word
    assert page.run("document.querySelector('article').getAttribute('aria-busy')") == "true"
    server.go.release()
    page.until(DRAWN.format(1))
    page.idle()
    assert page.run(SAID) == [WHOLE] and page.text("spoken") == "Answer: " + WHOLE
    assert "first word after 0.1 s, all after 1.23 s" in page.text("turns")
    sent = server.asked[0]
    assert sent.pop("picture") and sent == dict(
        turns=[], question="What is it?", temperature=0, off=[], model=0, max_new_tokens=128)


def test_temperature_is_the_server_s_until_it_is_changed(page, server):
    page.open(temperature=2.33)
    assert page.text("degrees") == "2.33"
    page.ask("What is it?")
    assert page.run("document.querySelector('#turns h3').textContent") == "temperature 2.33"
    page.browser.focus("temperature")
    page.browser.key("Home", 36)
    page.ask("What?")
    assert [asked["temperature"] for asked in server.asked] == [2.33, 0]


def test_others_ask_before(page, server):
    server.answer = lambda asked: (server.go.acquire(timeout=20) and dict(wait=n) for n in (2, 0))
    page.ask("What is it?", wait=False)
    server.go.release()
    page.until("document.getElementById('status').textContent === 'Questions before this one: 2'")
    server.go.release()
    page.idle()
    assert page.text("error").startswith("Error") and page.run(ASKED) == []


def test_the_conversation_goes_on_and_begins_anew(page, server):
    page.ask("What is it?")
    page.ask("Where is it?")
    assert server.asked[1]["turns"] == [["What is it?", WHOLE]]
    assert page.run(ASKED) == ["What is it?", "Where is it?"]
    page.click("Begin anew")
    assert page.run(ASKED) == [] and page.run("document.querySelectorAll('canvas').length") == 0
    page.ask("And now?")
    assert server.asked[2]["turns"] == []


def test_a_question_is_edited(page, server):
    for question in ("One?", "Two?", "Three?"):
        page.ask(question)
    page.click("Edit", 1)
    assert page.run("document.getElementById('question').value") == "Two?"
    page.run("document.getElementById('question').select()")
    page.ask("2?")
    assert page.run(ASKED) == ["One?", "2?"]
    assert server.asked[-1]["turns"] == [["One?", WHOLE]]
    page.click("Edit", 0)
    page.click("Don't edit")
    page.ask("Three?")
    assert page.run(ASKED) == ["One?", "2?", "Three?"]


@pytest.mark.parametrize("how", ["Escape", "Stop"])
def test_an_answer_is_stopped(page, server, how):
    server.answer = server.endless
    page.ask("Sing!", wait=False)
    page.until(f"{SAID}[0].length > 9")
    if how == "Stop":
        page.click("Stop")
    else:
        page.browser.key("Escape", 27)
    page.idle()
    assert server.left.wait(10)                                          # the connection is closed
    assert page.run(SAID)[0].startswith("na na na") and "[stopped]" in page.text("turns")
    assert page.text("status") == "Stopped." and page.run("!" + ERROR)
    server.answer = server.plain
    page.ask("And?")
    assert server.asked[1]["turns"][0][1].startswith("na na na")


def test_stopped_before_the_first_word_a_question_is_kept(page, server):
    server.answer = server.held
    page.ask("What is it?", wait=False)
    page.until("!" + IDLE)
    page.ask("More?", wait=False)                                        # not while it answers
    assert "Stop this answer first" in page.text("status")
    page.browser.key("Escape", 27)
    page.until("document.getElementById('question').value === 'What is it?\\nMore?'")
    assert page.run(ASKED) == []


def test_an_error_is_shown_and_the_question_kept(page, server):
    page.ask("What is it?")
    server.refuse = 429, "9 questions are waiting already <i>; try later"
    page.ask("Where?")
    assert page.text("error") == "Error: 9 questions are waiting already <i>; try later"
    assert page.run("document.getElementById('error').getAttribute('role')") == "alert"
    assert page.run("document.getElementById('question').value") == "Where?"
    assert page.run(ASKED) == ["What is it?"]
    page.click("Edit")
    page.ask("", wait=True)                                              # the edit fails, too:
    assert page.run(ASKED) == ["What is it?"]                            # nothing is lost
    page.browser.events.clear()
    server.refuse = None
    page.browser.key("Enter", 13, "\r")                                  # still that edit
    page.until(f"{IDLE} && {SAID}[0] === '{WHOLE}'")
    assert page.run(ASKED) == ["What is it?"] and page.run("!" + ERROR)


@pytest.mark.parametrize("end, error", [([dict(error="no memory")], "no memory"),
                                        ([], "the connection ended before the answer did")])
def test_an_answer_that_breaks_off(page, server, end, error):
    server.answer = lambda asked: [dict(wait=2), dict(text="It is"), *end]
    page.ask("What is it?")
    assert page.text("error") == f"Error: {error}"
    assert page.run(SAID) == ["It is"] and "[broken off]" in page.text("turns")


def test_no_picture_no_question_no_server(browser, server):
    server.reset()
    browser.open(server.url)
    page = Page(browser, server)
    page.ask("What?")
    assert "no picture yet" in page.text("error")
    page.drop()
    page.run("document.getElementById('question').value = ''")
    page.ask("  ")
    assert "nothing was asked" in page.text("error") and server.asked == []
    page.run("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    page.ask("What?")
    assert "is it still running?" in page.text("error")


def test_notes_of_the_server(page, server):
    server.answer = lambda asked: [dict(wait=3), done(
        cut="cut off after 5 tokens", notes=["it can't know this"], sight=None,
        why="no maps: int8")]
    page.ask("What is it?")
    for said in ("[cut off after 5 tokens]", "Note: it can't know this", "[no maps: int8]"):
        assert said in page.text("turns")
    assert page.run("document.querySelectorAll('canvas').length") == 0


def test_long_and_foreign_text_stays_whole(page, server):
    texts = ["\u0647\u0630\u0647 \u0642\u0637\u0629", "\u9019\u662f\u8c93" * 200, "x" * 900,
             "<b>a</b>\n\n  b &amp; \U0001f431"]
    page.browser.size(360, 740, mobile=True)
    for text in texts:
        server.answer = lambda asked, text=text: [dict(text=text), done(
            text, sight=sight(asked["question"], [text]))]
        page.run(f"document.getElementById('question').value = {json.dumps(text)}")
        page.ask("")
        assert page.run(FITS)
    assert page.run(SAID) == texts and page.run(ASKED) == texts
    assert page.run("[...document.querySelectorAll('.said')].map(x => getComputedStyle(x)."
                    "direction)") == ["rtl", "ltr", "ltr", "ltr"]
    assert page.run("document.querySelectorAll('main b').length") == 0


# --------------------------------------------------------------------------------------------------
# Maps

def test_maps_are_changed_by_keyboard(page):
    page.ask("What is it?")
    page.until(DRAWN.format(1))
    pictures = {page.run(MAP.format(0))}
    page.browser.focus("maps0-slider")
    page.browser.key("ArrowLeft", 37)
    assert page.text("maps0-layer") == "2 of 3"
    pictures.add(page.run(MAP.format(0)))
    page.browser.focus("maps0-map")
    page.browser.key("ArrowUp", 38)
    assert page.text("maps0-patch") == "Patch in row 2, column 3"
    pictures.add(page.run(MAP.format(0)))
    page.run("document.querySelector('[name=maps0-kind]:checked').focus()")
    page.browser.key("ArrowRight", 39)
    assert page.run("document.querySelector('[name=maps0-kind]:checked').value") == "layer_map"
    pictures.add(page.run(MAP.format(0)))
    assert len(pictures) == 4


def test_two_questions_side_by_side(page):
    page.ask("What is it?")
    page.ask("Where is it?")
    page.until(DRAWN.format(2))
    words = "[...document.querySelectorAll('#maps{}-words span')].map(x => x.firstChild.data)"
    assert page.run(words.format(0)) == ["Where", "is", "it?"]           # this one's
    assert page.run(words.format(1)) == ["What", "is", "it?"]            # the one before
    assert page.run(MAP.format(0)) == page.run(MAP.format(1))            # relative maps alike
    place = "[...document.querySelectorAll('.pane')].map(x => x.getBoundingClientRect().{})"
    assert page.run(f"new Set({place.format('top')}).size") == 1
    page.browser.size(700, 900)
    assert page.run(f"new Set({place.format('left')}).size") == 1        # one under the other
    page.browser.focus("maps0-slider")
    page.browser.key("Home", 36)
    assert page.text("maps1-layer") == "1 of 3"                          # both together
    live = "document.getElementById('maps{}-numbers').getAttribute('aria-live')"
    assert [page.run(live.format(i)) for i in (0, 1)] == ["polite", "off"]     # one is read out
    page.run("document.getElementById('together').click()")
    page.browser.key("End", 35)
    assert page.text("maps0-layer") == "3 of 3" and page.text("maps1-layer") == "1 of 3"
    page.click("Maps beside", 1)                                         # they change places
    assert page.run(words.format(1)) == ["Where", "is", "it?"]
    assert page.run(words.format(0)) == ["What", "is", "it?"]
    assert page.text("maps1-layer") == "3 of 3"                          # as each was left
    pressed = "[...document.querySelectorAll('#turns [aria-pressed=true]')].map(x => x.textContent)"
    assert page.run(pressed) == ["Maps", "Maps beside"]
    page.click("Close", 0)
    page.until(DRAWN.format(1))
    assert page.run("document.getElementById('both').hidden")


def test_a_part_is_switched_off(page, server):
    page.ask("What is it?")
    page.run("document.querySelector('[value=lpwca]').click()")
    page.run("(t => { t.value = 0.7; t.dispatchEvent(new Event('input')); })"
             "(document.getElementById('temperature'))")
    server.answer = lambda asked: [dict(text="A dog."), done("A dog.")]
    page.click("Ask again")
    page.until(f"{SAID}.length === 2")
    page.idle()
    assert server.asked[1]["off"] == ["lpwca"] and server.asked[1]["temperature"] == 0.7
    assert server.asked[1]["turns"] == []                                # the same question
    assert page.run(ASKED) == ["What is it?"] and page.run(SAID) == [WHOLE, "A dog."]
    heads = "[...document.querySelectorAll('#turns h3')].map(x => x.textContent)"
    assert page.run(heads) == ["Answer", "LPWCA neutral, temperature 0.7"]
    assert page.text("maps0-title") == "Maps: What is it? (LPWCA neutral, temperature 0.7)"
    page.until(DRAWN.format(2))
    page.ask("Where?")                                                   # goes on from the first
    assert server.asked[2]["turns"] == [["What is it?", WHOLE]]


def test_a_model_beside(page, server):
    page.open(models=["ours", "llava"], parts=[])
    server.answer = lambda asked: [dict(text=f"I am {asked['model']}."), done(
        f"I am {asked['model']}.")]
    page.ask("Who are you?")
    page.until(DRAWN.format(2))
    assert page.run(SAID) == ["I am 0.", "I am 1."]
    assert page.text("maps0-title").endswith("(ours)")
    assert page.text("maps1-title").endswith("(llava)")
    page.ask("And?")
    assert [asked["turns"] for asked in server.asked[2:]] == [
        [["Who are you?", "I am 0."]], [["Who are you?", "I am 1."]]]    # each knows its own
    assert page.run("document.getElementById('parts').hidden")


# --------------------------------------------------------------------------------------------------
# The real server

def test_with_the_real_server(browser, live):
    """Two models: the bundled one, and one that knows nothing."""
    browser.scheme("light")
    browser.size(1280, 900)
    browser.open(live.server.url + "/")                                  # a scene is drawn at once
    assert browser.run("document.querySelectorAll('#picture img').length") == 1
    browser.drop(png(), "mine.png")
    browser.until("document.getElementById('about').textContent === 'mine.png'")
    assert toy.KNOWS in browser.text("notes")
    browser.drop(b"no picture", "x.png")
    browser.until(ERROR)
    assert "cannot be read" in browser.text("error") and browser.text("about") == "mine.png"
    browser.events.clear()
    browser.drop(SCENE.read_bytes(), "scene.png")
    browser.until("document.getElementById('about').textContent === 'scene.png'")
    assert browser.text("notes") == ""
    shots.ask(browser, "What color is the square?", 2)
    assert browser.run(SAID)[0] == "black" and len(browser.run(SAID)) == 2
    shots.press(browser, "Begin anew")
    browser.run("document.querySelector('#parts [value=lwca]').click()")
    shots.ask(browser, "Where is the square?", 2)
    assert browser.run("document.querySelector('#turns h3').textContent").endswith("LWCA neutral")
    weights = "document.getElementById('maps0-weights').textContent"
    assert browser.run(weights) == "Layer 8: weight 0.125, before smoothing 0.125"
    assert browser.complaints() == []


def test_pictures_of_it(tmp_path, browser):
    shots.main(["--out", str(tmp_path)])
    found = {file.name: Image.open(file).width for file in tmp_path.iterdir()}
    assert found == {"explorer.png": 1280, "explorer-beside.png": 1280, "explorer-narrow.png": 360}
    assert max(file.stat().st_size for file in tmp_path.iterdir()) < 300_000
