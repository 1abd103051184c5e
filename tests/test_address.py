"""What a visitor has chosen, in the page's address and back, without the page."""

import pytest

from flowers.gallery import address

ALLOWED = {"view": ("browse", "runs", "search"), "class": ("rose", "tulip")}


class Browser:
    """A page whose address a visitor sees, opens and leaves with the arrow back."""

    def __init__(self, opened):
        self.state = {}
        self.addresses = [opened]
        self.run()

    def run(self):
        """One run of web.py."""
        address.read(self.state, self.addresses[-1], ALLOWED)
        new = address.write(self.state, self.addresses[-1])
        if new is not None and new != self.addresses[-1]:
            self.addresses.append(new)

    def click(self, **choices):
        address.change(self.state, **choices)
        self.run()

    def back(self):
        self.addresses.pop()
        self.run()


CHOSEN = {
    "view": "runs",
    "class": "rose",
    "split": "test",
    "ids": "7, 20-30",
    "page": 3,
    "image": 17,
    "run": "one/of/these",
    "other": ["another", "a third"],
    "sure": (5, 60),
    "q": "a rose, and no tulip",
}


def test_the_address_opens_the_same_again():
    browser = Browser({})
    browser.click(**CHOSEN)
    again = Browser(browser.addresses[-1])
    assert again.state == browser.state
    assert {key: again.state[key] for key in CHOSEN} == CHOSEN
    assert again.addresses == browser.addresses[-1:]  # it was right, and is not set once more


def test_what_is_at_its_default_is_not_in_the_address():
    browser = Browser({})
    browser.click(page=2, split="all")
    assert browser.addresses[-1] == {"page": "2"}
    browser.click(page=1)
    assert browser.addresses[-1] == {}


def test_a_click_counts_and_so_does_going_back():
    browser = Browser({})
    browser.click(page=2)
    browser.click(image=5)
    assert browser.addresses == [{}, {"page": "2"}, {"page": "2", "image": "5"}]
    browser.back()
    assert (browser.state["page"], browser.state["image"]) == (2, None)
    browser.back()
    assert browser.state["page"] == 1
    browser.run()  # nothing has happened: all stays
    assert browser.addresses == [{}]


def test_a_widget_that_is_not_on_the_page_is_not_forgotten():
    browser = Browser({})
    browser.click(q="rose")
    before = dict(browser.state)
    browser.run()
    assert browser.state == before


@pytest.mark.parametrize(
    "key, value, read",
    [
        ("view", "nowhere", "browse"),
        ("class", "oak", None),
        ("page", "-1", 1),
        ("image", "1e9", None),
        ("image", "0007", 7),
        ("q", "x" * 1000, "x" * address.MAX_TEXT),
        ("run", "was deleted", "was deleted"),  # the page says that there is no such run
        ("other", ["a", "a", *"bcdefgh"], list("abcde")),
        ("sure", "80-20", (20, 80)),
        ("sure", "500-1", (1, 100)),
        ("sure", "all", (0, 100)),
    ],
)
def test_what_an_address_says_is_checked(key, value, read):
    assert Browser({key: value}).state[key] == read


def test_an_older_link_names_the_model_of_a_search_a_run():
    state = Browser({"view": "search", "run": "mine"}).state
    assert (state["model"], state["run"]) == ("mine", None)
