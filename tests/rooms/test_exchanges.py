"""The path of every answer: what its parts promise on their own."""

import antigravity_proxy as agproxy


def test_requests_of_one_conversation_share_a_number() -> None:
    def number(*texts: str, client: str = "", session: str = "", system: str = "s") -> int:
        said = tuple(agproxy.Message("user", (agproxy.Text(text),)) for text in texts)
        return agproxy.affinity_of(client, {"session_id": session}, {}, agproxy.Request("m", said, (system,)))

    assert number("hello") == number("hello", "and then?")
    assert number("hello", session="x") == number("other", session="x", system="t")
    assert len({number("hello"), number("hi"), number("hello", client="ci"), number("hello", system="t")}) == 4
    tool = "You are a tool with long instructions. " * 1000
    assert number("hello", system=tool) == number("hello", "and then?", system=tool) != number("hi", system=tool)
    assert agproxy.affinity_of("", {}, {}, agproxy.Request("m", ())) == agproxy.affinity_of(
        "", {}, {}, agproxy.Request("n", ())
    )
