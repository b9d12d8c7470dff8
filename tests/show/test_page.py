"""The page, as it is written and as a browser shows it."""

import base64
import hashlib
import html
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from aligned_pairs import WEIGHTS, pair
from PIL import Image

from sparc_loss.show import alignment_page

pytestmark = pytest.mark.slow

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
HOSTILE = '<script>document.title = "broken"</script> & "dog"'
HOSTILE_WORDS = ('<script>document.title = "broken"</script>', "&", '"dog"')


def test_it_refuses_no_pairs():
    with pytest.raises(ValueError, match="pairs is empty; expected at least one aligned pair"):
        alignment_page([])


def test_nothing_of_a_caption_or_title_is_markup():
    page = alignment_page([pair(HOSTILE, HOSTILE_WORDS, title="</h2><b>")], title="<i>")
    assert '<script>document.title = "broken"' not in page
    assert "</h2><b>" not in page
    assert "<i>" not in page
    assert page.count("<script") == 2  # the pair's data, and the page's own


def test_it_holds_nothing_that_a_browser_would_fetch():
    page = alignment_page([pair()])
    assert re.findall(r"""(?:src|href)=["'](?!data:)|url\(|@import|https?:""", page) == []


def test_the_browser_may_run_the_pages_own_script_and_fetch_nothing():
    page = alignment_page([pair()])
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy"\s+content="([^"]*)"', page)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)

    def digest(content):
        return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

    assert html.unescape(policy) == (
        f"default-src 'none'; img-src data:; style-src '{digest(style)}'; script-src '{digest(script)}'"
    )


@pytest.mark.parametrize(
    ("size", "extent"), [((16, 30), [1, 1]), ((20, 40), [0.8, 0.75]), ((16, 25), [1, 1.2])], ids=str
)
def test_the_grid_covers_its_share_of_the_image(size, extent):
    """Two rows of patches 8 pixels high, three columns 10 pixels wide."""
    page = alignment_page([replace(pair(), pixels=np.zeros((*size, 3), np.uint8))])
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', page)
    assert json.loads(data)["extent"] == pytest.approx(extent)


def test_the_same_pairs_give_the_same_page():
    assert alignment_page([pair()]) == alignment_page([pair()])


def test_boxes_are_drawn_into_the_image():
    boxed = replace(pair(), boxes=(((2.0, 3.0, 12.0, 9.0), (1,)),))
    encoded = re.search(r"data:image/png;base64,([^\"]+)", alignment_page([boxed])).group(1)
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
    changed = (drawn != pair().pixels).any(axis=-1)
    expected = np.zeros_like(changed)
    expected[3:9, 2:12] = True
    expected[4:8, 3:11] = False
    assert np.array_equal(changed, expected)


def test_the_data_are_the_weights():
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', alignment_page([pair()]))
    data = json.loads(data)
    assert data["words"] == ["red", "dog", "!"]
    assert data["grid"] == [2, 3]
    np.testing.assert_allclose(data["weights"], np.array(WEIGHTS).reshape(3, 6), rtol=1e-3)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    selenium = pytest.importorskip("selenium.webdriver", reason="the browser tests need selenium")
    if not CHROMIUM or not DRIVER:
        pytest.skip("the browser tests need chromium and chromedriver, which are not on the PATH")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1200,900",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(flag)
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Article:
    """What a person sees of a pair, and does to it."""

    def __init__(self, driver, number: int) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        self.driver = driver
        self.element = driver.find_elements("css selector", ".pair")[number]
        self.words = self.element.find_elements("css selector", ".word")
        self.patches = self.element.find_elements("css selector", ".patch")
        self.actions = lambda: ActionChains(driver, duration=0)

    def point_at(self, element) -> None:
        self.actions().move_to_element(element).perform()

    def point_nowhere(self) -> None:
        self.point_at(self.driver.find_element("css selector", "h1"))

    def press(self, *keys: str) -> None:
        for key in keys:
            self.actions().send_keys(key).perform()

    @property
    def light(self) -> list[float] | None:
        """How brightly each patch is lit; None where the whole image is shown."""
        if "lit" not in self.element.get_attribute("class").split():
            return None
        script = """
            const veil = arguments[0].querySelector(".veil");
            const { data } = veil.getContext("2d").getImageData(0, 0, veil.width, veil.height);
            return [...data].filter((_, index) => index % 4 === 3);
        """
        return [1 - alpha / 255 for alpha in self.driver.execute_script(script, self.element)]

    @property
    def highest(self) -> list[int]:
        return [index for index, patch in enumerate(self.patches) if "highest" in patch.get_attribute("class")]

    @property
    def word_light(self) -> list[float]:
        script = "return [...arguments].map((word) => Number(word.style.getPropertyValue('--light')))"
        return self.driver.execute_script(script, *self.words)

    @property
    def unselected(self) -> list[bool]:
        return ["unselected" in word.get_attribute("class") for word in self.words]

    @property
    def pinned(self) -> list[bool]:
        return [word.get_attribute("aria-pressed") == "true" for word in self.words]

    @property
    def status(self) -> str:
        return self.element.find_element("css selector", "[role=status]").text


def light_of(word: int) -> list[float]:
    weights = np.array(WEIGHTS[word]).flatten()
    return ((weights / weights.max()) ** 2).tolist()


def assert_lit(article: Article, word: int) -> None:
    assert article.light == pytest.approx(light_of(word), abs=1 / 255)


@pytest.fixture
def show(driver, tmp_path):
    """Open a page of the given pairs; returns what is seen of each."""

    def show(*pairs) -> list[Article]:
        file = Path(tmp_path, "page.html")
        file.write_text(alignment_page(pairs), encoding="utf-8")
        driver.get(file.as_uri())
        return [Article(driver, number) for number in range(len(pairs))]

    yield show
    # Errors of the script, and what the policy refused; "rendering" only minds how we read the canvas.
    assert [entry for entry in driver.get_log("browser") if entry["source"] != "rendering"] == []


@pytest.fixture
def article(show):
    return show(pair())[0]


def test_at_first_the_image_is_whole_and_nothing_is_said(article):
    assert article.light is None
    assert article.status == ""
    assert [word.text for word in article.words] == ["red", "dog", "!"]


def test_pointing_at_a_word_lights_its_patches(article):
    for number, word in enumerate(article.words):
        article.point_at(word)
        assert_lit(article, number)
    article.point_nowhere()
    assert article.light is None


def test_the_highest_patch_is_framed_where_there_is_one(article):
    highest = []
    for word in article.words:
        article.point_at(word)
        highest.append(article.highest)
    assert highest == [[0], [5], []]


def test_the_share_of_patches_kept_is_said(article):
    said = []
    for word in article.words:
        article.point_at(word)
        said.append(article.status)
    assert said == [
        "“red” keeps 3 of 6 patches, 50 %. Its highest is row 1, column 1, with 50 % of the weight.",
        "“dog” keeps 2 of 6 patches, 33 %. Its highest is row 2, column 3, with 80 % of the weight.",
        "“!” keeps 4 of 6 patches, 67 %. Several share the highest weight, 25 % each.",
    ]


def test_small_and_nearly_whole_shares_are_not_rounded_away(show):
    weights = torch.full((1, 20, 20), 0.9999 / 398)
    weights[0, 0, 0], weights[0, 0, 1] = 0, 0.0001
    (article,) = show(replace(pair(words=("red",)), weights=weights, patch_size=(0.8, 1.5)))
    article.point_at(article.words[0])
    assert "keeps 399 of 400 patches, more than 99 %." in article.status
    article.point_at(article.patches[1])
    assert article.status == "Row 1, column 2 is selected by 1 of 1 words: “red” less than 0.1 %"


def test_a_click_pins_a_word_and_another_lets_go(article):
    article.words[1].click()
    article.point_nowhere()
    assert article.pinned == [False, True, False]
    assert_lit(article, 1)

    article.point_at(article.words[0])  # shown while pointed at
    assert_lit(article, 0)
    article.point_nowhere()
    assert_lit(article, 1)

    article.words[1].click()
    article.point_nowhere()
    assert article.pinned == [False, False, False]
    assert article.light is None


def test_pinning_another_word_lets_the_first_go(article):
    article.words[0].click()
    article.words[2].click()
    article.point_nowhere()
    assert article.pinned == [False, False, True]
    assert_lit(article, 2)


def test_the_keyboard_reaches_pins_and_lets_go(article):
    article.press("\ue004")  # Tab: the checkbox
    article.press("\ue004")  # the image
    article.press("\ue004")
    assert_lit(article, 0)
    article.press("\ue004")
    assert_lit(article, 1)
    article.press("\ue007")  # Enter
    assert article.pinned == [False, True, False]
    article.press("\ue004")
    assert_lit(article, 2)
    article.press("\ue00c")  # Escape
    assert article.pinned == [False, False, False]
    assert article.light is None


def test_pointing_at_a_patch_lights_the_words_that_select_it(article):
    article.point_at(article.patches[1])
    assert article.word_light == pytest.approx([0.25, 0, 1], abs=1e-3)
    assert article.unselected == [False, True, False]
    assert article.status == "Row 1, column 2 is selected by 2 of 3 words: “red” 25 %, “!” 25 %"


def test_a_patch_that_no_word_selects_says_so(show):
    (article,) = show(pair(words=("red",)))
    article.point_at(article.patches[2])
    assert article.status == "Row 1, column 3: no word selects this patch."


def test_a_pinned_word_stays_lit_while_patches_are_pointed_at(article):
    article.words[0].click()
    article.point_at(article.patches[5])
    assert_lit(article, 0)
    assert article.unselected == [True, False, True]


def test_the_arrow_keys_walk_over_the_patches_and_stop_at_the_edge(article):
    article.press("\ue004", "\ue004")
    assert article.status.startswith("Row 1, column 1")
    article.press("\ue014", "\ue015")  # right, down
    assert article.status.startswith("Row 2, column 2")
    article.press("\ue014", "\ue014", "\ue015", "\ue012")  # right, right, down, left
    assert article.status.startswith("Row 2, column 2")
    article.press("\ue013", "\ue013")  # up, up
    assert article.status.startswith("Row 1, column 2")


def test_patches_lie_on_their_part_of_the_image(show, driver):
    (article,) = show(pair())
    script = """
        const image = arguments[0].getBoundingClientRect();
        return [...arguments[1]].map((patch) => {
            const box = patch.getBoundingClientRect();
            return [(box.left - image.left) / image.width, (box.top - image.top) / image.height,
                    box.width / image.width, box.height / image.height];
        });
    """
    image = article.element.find_element("css selector", "img")
    boxes = driver.execute_script(script, image, article.patches)
    expected = [[column / 3, row / 2, 1 / 3, 1 / 2] for row in range(2) for column in range(3)]
    np.testing.assert_allclose(boxes, expected, atol=2e-3)


def test_pixels_outside_of_all_patches_are_not_covered(show, driver):
    (article,) = show(replace(pair(), pixels=np.full((20, 40, 3), 255, np.uint8)))
    script = """
        const [image, veil] = [...arguments].map((element) => element.getBoundingClientRect());
        return [veil.left - image.left, veil.top - image.top, veil.width / image.width, veil.height / image.height];
    """
    parts = [article.element.find_element("css selector", name) for name in ("img", ".veil")]
    np.testing.assert_allclose(driver.execute_script(script, *parts), [0, 0, 30 / 40, 16 / 20], atol=2e-3)


def test_a_gallery_keeps_its_pairs_apart(show):
    first, second = show(pair(title="one"), pair("dog, red", ("dog", "red"), title="two"))
    first.words[0].click()
    second.words[1].click()
    second.point_at(second.words[0])
    assert (first.pinned, second.pinned) == ([True, False, False], [False, True])
    assert_lit(first, 0)
    assert_lit(second, 0)
    assert [article.element.find_element("css selector", "h2").text for article in (first, second)] == ["one", "two"]


def test_a_script_in_a_caption_is_shown_as_text(show, driver):
    (article,) = show(pair(HOSTILE, HOSTILE_WORDS))
    assert article.element.find_element("css selector", ".caption").text == HOSTILE
    assert driver.title == "What each word selects"
    article.point_at(article.words[0])
    assert article.status.startswith(f"“{HOSTILE_WORDS[0]}” keeps 3 of 6 patches")


def test_what_lies_between_words_is_shown_and_no_word(show):
    (article,) = show(pair("¡ red ~ dog …", ("red", "dog")))
    assert article.element.find_element("css selector", ".caption").text == "¡ red ~ dog …"
    assert [word.text for word in article.words] == ["red", "dog"]


def test_a_caption_longer_than_the_context_says_so(show):
    (article,) = show(pair(read=2))
    assert article.element.find_element("css selector", ".notice").text == (
        "The model's context ends after 2 of 3 words."
    )
    assert [word.text for word in article.words] == ["red", "dog"]
    assert article.element.find_element("css selector", "s").text == "!"


def test_smooth_is_a_choice(article, driver):
    veil = article.element.find_element("css selector", ".veil")
    assert veil.value_of_css_property("image-rendering") == "pixelated"
    driver.find_element("id", "smooth").click()
    assert veil.value_of_css_property("image-rendering") == "auto"


def test_it_fetches_nothing(article, driver):
    fetched = driver.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []


def test_a_screen_reader_finds_names_and_roles(show, driver):
    show(pair(title="one"))
    driver.execute_cdp_cmd("Accessibility.enable", {})
    nodes = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    driver.execute_cdp_cmd("Accessibility.disable", {})
    found = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    assert [name for role, name in found if role == "button"] == ["red", "dog", "!"]
    assert [name for role, name in found if role == "gridcell"][:2] == ["Row 1, column 1", "Row 1, column 2"]
    for one in (
        ("article", "one"),
        ("image", "red dog!"),
        ("grid", "Patches of the image"),
        ("group", "Words of the caption"),
        ("checkbox", "Smooth"),
    ):
        assert one in found
    assert [role for role, _ in found].count("status") == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(show, driver, scheme):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    (article,) = show(pair(read=2, title="one"))
    article.words[0].click()
    article.point_nowhere()

    def luminance(element, css: str) -> float:
        channels = np.array(re.findall(r"[\d.]+", element.value_of_css_property(css))[:3], float) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    body, card = driver.find_element("css selector", "body"), article.element
    assert (luminance(body, "background-color") < 0.05) == (scheme == "dark")
    grounds = {"header p": body, "footer": body, ".status": card, ".caption": card, ".notice": card, "h2": card}
    for name, ground in grounds.items():
        text = luminance(driver.find_element("css selector", name), "color")
        paper = luminance(ground, "background-color")
        contrast = (max(text, paper) + 0.05) / (min(text, paper) + 0.05)
        assert contrast >= 4.5, name  # WCAG 2.2, 1.4.3
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
