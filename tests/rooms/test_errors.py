"""The errors' classes: what of each a client is sent, and what PoolExhausted takes over."""

from collections.abc import Iterator

import pytest

import antigravity_proxy as agproxy


def kinds(parent: type[agproxy.GatewayError] = agproxy.GatewayError) -> Iterator[type[agproxy.GatewayError]]:
    for kind in parent.__subclasses__():
        yield kind
        yield from kinds(kind)


UPSTREAM = [kind for kind in kinds() if issubclass(kind, agproxy.UpstreamError)]


@pytest.mark.parametrize("kind", [kind for kind in kinds() if kind is not agproxy.PoolExhausted])
def test_the_words_of_an_error_fit_its_status(kind: type[agproxy.GatewayError]) -> None:
    error = kind("No.", "x") if issubclass(kind, agproxy.Unusable) else kind("No.")  # type: ignore[call-arg,arg-type]
    by_status = "rate_limit_exceeded" if error.status == 429 else "server_error"
    by_status = "invalid_prompt" if error.status < 429 else by_status
    final = error.code in ("context_length_exceeded", "insufficient_quota")
    assert error.failed_code == (error.code if final else by_status)
    assert error.retry_helps == (error.code != "insufficient_quota")
    assert error.waits == (error.status in (429, 503))


@pytest.mark.parametrize("kind", UPSTREAM)
def test_the_pool_says_what_its_last_error_says(kind: type[agproxy.UpstreamError]) -> None:
    last = kind("No.", param="x")
    error = agproxy.PoolExhausted("Nobody could answer.", last, 3)
    for name in ("status", "type", "param", "failed_code", "waits", "retry_helps", "falls_back"):
        assert getattr(error, name) == getattr(last, name)
    assert (error.code, error.retry_after_s) == (last.code or "server_error", 3)


@pytest.mark.parametrize(
    "text",
    ["AIzaSyA-1234567890", "Bearer abcdefgh.ij", "https://u:p@host/", "https://x/?key=abc", "sk-0123456789abcdef"],
)
def test_a_message_tells_no_secret(text: str) -> None:
    error = agproxy.GatewayError(f"It said {text} at last.")
    assert "…" in error.message and text not in error.message and str(error) == error.message
