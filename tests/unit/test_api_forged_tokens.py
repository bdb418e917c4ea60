"""Page and resume tokens that the api did not make: it reads nothing of them, and they cost nothing."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
from sqlalchemy import make_url

from services.api import page_tokens
from services.api.errors import InvalidArgument
from services.api.filters import Filter
from services.api.token_keys import MAC_LENGTH, TokenKeys, token_keys
from services.api.watch import resume_tokens
from services.api.watch.watchers import WatchSelection
from services.common.kafka.topic_partition import TopicPartition
from services.common.kafka.topics import EVENT_TOPICS
from tests.forms import by_form

KEYS = TokenKeys([b"the api's key".ljust(32)])
OTHERS = TokenKeys([b"a forger's key".ljust(32)])
DIGEST = WatchSelection("shop", None, Filter()).digest()
POSITIONS = {TopicPartition(topic, number): 10**6 for topic in EVENT_TOPICS for number in range(12)}
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"

Decode = Callable[[str], object]


def resume(token: str) -> object:
    return resume_tokens.decode(KEYS, token, DIGEST)


def page(token: str) -> object:
    return page_tokens.decode(KEYS, token, DIGEST)


def test_a_client_cannot_make_a_token_that_starts_at_the_first_record() -> None:
    text = resume_tokens.encode_positions(dict.fromkeys(POSITIONS, 0))
    for forged in (resume_tokens.token(OTHERS, DIGEST, text), "A" * MAC_LENGTH + text, text):
        with pytest.raises(InvalidArgument):
            resume(forged)
    with pytest.raises(InvalidArgument):
        page(page_tokens.encode(OTHERS, bytes(16), DIGEST))


@pytest.mark.parametrize("character", ["_", "/", "A", "é", "\0"])
def test_the_longest_forged_token_takes_no_time(character: str) -> None:
    """`_` is all ones: an integer of 43,000 bytes, if anyone adds it up."""
    for decode in (resume, page):
        begin = time.process_time()
        with pytest.raises(InvalidArgument):
            decode(character * (60 << 10))
        assert time.process_time() - begin < 0.01


def test_a_token_belongs_to_its_tenant_its_filter_and_its_kind() -> None:
    text = resume_tokens.encode_positions(POSITIONS)
    token = resume_tokens.token(KEYS, DIGEST, text)
    assert resume(token) == POSITIONS
    for other in (
        WatchSelection("bank", None, Filter()),
        WatchSelection("shop", None, Filter(status=("failed",))),
        WatchSelection("shop", bytes(16), Filter()),
    ):
        with pytest.raises(InvalidArgument):
            resume_tokens.decode(KEYS, token, other.digest())
    with pytest.raises(InvalidArgument):
        resume(page_tokens.encode(KEYS, bytes(16), DIGEST))
    assert len(token) < 700


def test_a_key_is_replaced_without_a_gap() -> None:
    old, new = "o" * 32, "n" * 32
    url = make_url("mysql://localhost/postroad")
    before, both, after = (token_keys(given, url) for given in (old, f"{new},{old}", new))
    token = page_tokens.encode(before, bytes(16), DIGEST)
    assert page_tokens.decode(both, token, DIGEST) == bytes(16)
    with pytest.raises(InvalidArgument):
        page_tokens.decode(after, token, DIGEST)
    assert page_tokens.decode(after, page_tokens.encode(both, bytes(16), DIGEST), DIGEST) == bytes(16)


def test_replicas_without_a_key_of_their_own_share_one() -> None:
    one, same, other, none, neither = (
        token_keys("", make_url(f"mysql://{user}/postroad"))
        for user in ("ann:secret@one", "bob:secret@two", "ann:Secret@one", "ann@one", "ann@one")
    )
    token = page_tokens.encode(one, bytes(16), DIGEST)
    assert page_tokens.decode(same, token, DIGEST) == bytes(16)
    for keys in (other, none):
        with pytest.raises(InvalidArgument):
            page_tokens.decode(keys, token, DIGEST)
    # Without a password anyone could compute the key, so each process has a random one.
    with pytest.raises(InvalidArgument):
        page_tokens.decode(neither, page_tokens.encode(none, bytes(16), DIGEST), DIGEST)


@pytest.mark.parametrize("decode", [resume, page], ids=["resume", "page"])
def test_no_changed_token_is_taken(decode: Decode) -> None:
    chance = random.Random(1)
    text = resume_tokens.encode_positions(POSITIONS)
    good = resume_tokens.token(KEYS, DIGEST, text)
    if decode is page:
        good = page_tokens.encode(KEYS, bytes(range(16)), DIGEST)
    decode(good)
    for _ in range(by_form(10_000, 500_000)):
        changed = mutated(good, chance)
        if changed != good:
            with pytest.raises(InvalidArgument):
                decode(changed)


def mutated(token: str, chance: random.Random) -> str:
    """Return the token with a few characters changed, cut, added or swapped."""
    characters = list(token)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(characters))
        match chance.randrange(4):
            case 0:
                characters[at] = chance.choice(ALPHABET)
            case 1:
                del characters[at:]
                characters += chance.choices(ALPHABET, k=chance.randint(1, 40))
            case 2:
                characters.insert(at, chance.choice(ALPHABET))
            case _:
                other = chance.randrange(len(characters))
                characters[at], characters[other] = characters[other], characters[at]
    return "".join(characters)
