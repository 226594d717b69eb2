"""Which Gemini model a name means, and by which rule."""

import time

import pytest

import antigravity_proxy as agproxy

LISTED = (
    "gemini-2.5-pro",
    "gemini-2.5-flash",
    "gemini-2.5-flash-lite-preview-09-2025",
    "gemini-3-flash-preview",
    "gemini-3.1-pro-preview",
    "gemini-flash-latest",
    "gemini-embedding-001",
    "gemma-3-27b-it",
)
ALIASES = {"fast": "gemini-2.5-flash", "my-*": "gemini-2.5-pro", "my-f*": "gemini-3-flash", "*-f": "gemini-2.5-pro"}
CONFIG = agproxy.Config((), aliases=ALIASES | {"gpt-4o": "gemini-2.5-pro"})


@pytest.mark.parametrize(
    ("name", "model", "rule"),
    [
        ("fast", "gemini-2.5-flash", "models.map 'fast'"),
        ("gpt-4o", "gemini-2.5-pro", "models.map 'gpt-4o'"),
        ("my-thing", "gemini-2.5-pro", "models.map 'my-*'"),
        ("my-fast", "gemini-3-flash-preview", "models.map 'my-f*'"),
        ("my-f", "gemini-3-flash-preview", "models.map 'my-f*'"),
        ("gpt-4o-mini", "gemini-2.5-flash-lite-preview-09-2025", "built-in 'gpt-*mini*'"),
        ("gpt-5.5", "gemini-2.5-pro", "built-in 'gpt-5*'"),
        ("o3", "gemini-2.5-pro", "built-in 'o3*'"),
        ("claude-sonnet-4-5", "gemini-2.5-pro", "built-in 'claude-*'"),
        ("codex-mini-latest", "gemini-2.5-flash", "built-in 'codex*mini*'"),
        ("text-embedding-3-small", "gemini-embedding-001", "built-in 'text-embedding-*'"),
        ("gemma-3-27b-it", "gemma-3-27b-it", "listed by the upstream"),
        ("models/gemini-2.5-pro", "gemini-2.5-pro", "listed by the upstream"),
        ("openai/gpt-4.1", "gemini-2.5-flash", "built-in 'gpt-*'"),
        ("gemini-3-flash", "gemini-3-flash-preview", "a gemini name as it is"),
        ("gemini-2.5-flash-preview-05-20", "gemini-2.5-flash", "a gemini name as it is"),
        ("gemini-3-pro", "gemini-3.1-pro-preview", "a gemini name as it is"),
        ("gemini-9-ultra", "gemini-9-ultra", "a gemini name as it is"),
    ],
)
def test_a_name_is_resolved_by_the_first_rule_that_knows_it(name: str, model: str, rule: str) -> None:
    mapped = agproxy.map_model(name, CONFIG, LISTED)
    assert (mapped.model, mapped.rule) == (model, rule)


def test_without_a_list_gemini_names_pass_as_they_are() -> None:
    assert agproxy.map_model("gemini-3-flash", CONFIG, None).model == "gemini-3-flash"


def test_equal_patterns_are_decided_by_the_longer_start_then_by_the_file() -> None:
    config = agproxy.Config((), aliases={"*abc": "gemini-1", "a*bc": "gemini-2", "ab*c": "gemini-3", "*bca": "x"})
    assert agproxy.map_model("abc", config, None).model == "gemini-3"
    config = agproxy.Config((), aliases={"a*c*": "gemini-1", "a*b*": "gemini-2"})
    assert agproxy.map_model("abc", config, None).model == "gemini-1"


def test_a_long_name_and_many_stars_take_no_time() -> None:
    config = agproxy.Config((), aliases={"*a" * 9 + "*b": "gemini-1", "x*a*a": "gemini-2"}, default_model="gemini-3")
    assert agproxy.map_model("a" * 512, config, None).model == "gemini-3"
    assert agproxy.map_model("a" * 511 + "b", config, None).model == "gemini-1"
    assert [agproxy.map_model(name, config, None).model[-1] for name in ("xa", "xaa", "xabab", "xaba")] == list("3232")


def test_a_long_name_of_many_suffixes_takes_no_time() -> None:
    began = time.process_time()
    name = "gemini-" + "11-" * 20_000
    assert agproxy.map_model(f"{name}x", CONFIG, LISTED).model == f"{name}x"
    assert agproxy.map_model(f"gemini-{'1' * 5000}-flash", CONFIG, LISTED).rule == "a gemini name as it is"
    assert time.process_time() - began < 1


def test_the_default_takes_what_nobody_knows() -> None:
    config = agproxy.Config((), default_model="gemini-2.5-flash")
    assert agproxy.map_model("llama", config, LISTED).rule == "models.default"


@pytest.mark.parametrize(
    ("name", "said"),
    [("gemma-3-27", "Near names: gemma-3-27b-it"), ("gemini-2\r\nEvil: 1", "is not known"), ("ö", "is not")],
)
def test_an_unknown_name_is_refused_with_near_ones(name: str, said: str) -> None:
    with pytest.raises(agproxy.ModelNotFound, match=said):
        agproxy.map_model(name, CONFIG, LISTED)


@pytest.mark.parametrize(
    ("model", "thinks", "signatures"),
    [
        ("gemini-2.0-flash", False, False),
        ("gemini-2.5-flash", True, False),
        ("gemini-2.5-flash-lite", False, False),
        ("gemini-3-pro-preview", True, True),
        ("gemini-9-ultra", True, True),
        ("gemma-3-27b-it", False, False),
    ],
)
def test_traits_follow_the_parsed_version(model: str, thinks: bool, signatures: bool) -> None:
    traits = agproxy.traits_of(model, {})
    assert (traits.thinks, traits.signatures) == (thinks, signatures)


def test_traits_are_overridden_by_the_file() -> None:
    assert not agproxy.traits_of("gemini-3-pro-preview", {"gemini-3*": {"thinks": False}}).thinks
