"""The verdict cache: how long verdicts hold, one lookup a domain, and what cancelling does."""

import asyncio
from collections.abc import Callable

import pytest

from services.validator.cache import VerdictCache
from services.validator.mx import Kind, Reason, Verdict

OK = Verdict(Kind.OK, None, ((10, "mx.test"),), "", 60)
FAILED = Verdict(Kind.FAILED, Reason.NULL_MX, (), "null MX", 30)
DARK = Verdict(Kind.TRANSIENT, Reason.DNS_UNAVAILABLE, (), "SERVFAIL", 30)


class World:
    """A DNS whose answers come when the test lets them, and a clock that it moves."""

    def __init__(self, verdict: Verdict | Callable[[str], Verdict] = OK) -> None:
        self.verdict = verdict
        self.now = 1000.0
        self.asked: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def lookup(self, domain: str) -> Verdict:
        self.asked.append(domain)
        await self.gate.wait()
        return self.verdict(domain) if callable(self.verdict) else self.verdict

    def cache(self, *, transient_ttl: float = 30.0, size: int = 50_000) -> VerdictCache:
        return VerdictCache(self.lookup, lambda: self.now, transient_ttl=transient_ttl, size=size)


async def asleep() -> None:
    """Lets every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize("verdict", [OK, FAILED, DARK])
async def test_a_verdict_holds_for_its_ttl_and_no_longer(verdict: Verdict) -> None:
    world = World(verdict)
    cache = world.cache()
    assert cache.get("a.test") is None
    assert await cache.resolve("a.test") is verdict
    world.now += verdict.ttl - 0.001
    assert cache.get("a.test") is verdict
    assert await cache.resolve("a.test") is verdict
    world.now += 0.001
    assert cache.get("a.test") is None
    assert await cache.resolve("a.test") is verdict
    assert world.asked == ["a.test", "a.test"]


async def test_trouble_is_believed_for_less_than_the_shortest_retry() -> None:
    world = World(DARK)
    cache = world.cache(transient_ttl=4.5)
    await cache.resolve("a.test")
    world.now += 4.4
    assert cache.get("a.test") is DARK
    world.now += 0.1
    assert cache.get("a.test") is None


async def test_the_ttl_runs_from_the_answer_not_from_the_question() -> None:
    world = World()
    world.gate.clear()
    cache = world.cache()
    asking = asyncio.create_task(cache.resolve("a.test"))
    await asleep()
    world.now += 59
    world.gate.set()
    await asking
    world.now += 59
    assert cache.get("a.test") is OK


async def test_all_forms_of_a_domain_share_one_verdict() -> None:
    world = World()
    cache = world.cache()
    for form in ("Bücher.example", "xn--bcher-kva.example", "BÜCHER.EXAMPLE."):
        assert await cache.resolve(form) is OK
    assert world.asked == ["xn--bcher-kva.example"]
    assert cache.get("xn--bcher-kva.example") is OK


async def test_what_is_no_domain_is_never_asked_for() -> None:
    world = World()
    verdict = await world.cache().resolve("a..b")
    assert (verdict.kind, verdict.reason) == (Kind.FAILED, Reason.NO_SUCH_DOMAIN)
    assert world.asked == []


async def test_callers_of_one_domain_share_one_lookup() -> None:
    world = World()
    world.gate.clear()
    cache = world.cache()
    callers = [asyncio.create_task(cache.resolve(name)) for name in ("a.test", "A.test", "b.test") * 50]
    await asleep()
    world.gate.set()
    assert set(await asyncio.gather(*callers)) == {OK}
    assert world.asked == ["a.test", "b.test"]


async def test_a_cancelled_caller_leaves_the_lookup_to_the_others() -> None:
    world = World()
    world.gate.clear()
    cache = world.cache()
    first, second = (asyncio.create_task(cache.resolve("a.test")) for _ in range(2))
    await asleep()
    first.cancel()
    await asleep()
    assert first.cancelled()
    assert not second.done()
    third = asyncio.create_task(cache.resolve("a.test"))
    await asleep()
    world.gate.set()
    assert await second is await third is OK
    assert world.asked == ["a.test"]


async def test_a_lookup_whose_callers_are_all_cancelled_still_fills_the_cache() -> None:
    world = World()
    world.gate.clear()
    cache = world.cache()
    caller = asyncio.create_task(cache.resolve("a.test"))
    await asleep()
    caller.cancel()
    await asleep()
    world.gate.set()
    await asleep()
    assert cache.get("a.test") is OK


async def test_an_error_reaches_every_caller_and_is_not_kept() -> None:
    def broken(domain: str) -> Verdict:
        raise RuntimeError(domain)

    world = World(broken)
    world.gate.clear()
    cache = world.cache()
    callers = [asyncio.create_task(cache.resolve("a.test")) for _ in range(3)]
    await asleep()
    world.gate.set()
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert [str(result) for result in results] == ["a.test"] * 3
    world.verdict = OK
    assert await cache.resolve("a.test") is OK


async def test_an_error_that_nobody_waits_for_is_quiet() -> None:
    def broken(domain: str) -> Verdict:
        raise RuntimeError(domain)

    loud: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: loud.append(context))
    world = World(broken)
    world.gate.clear()
    cache = world.cache()
    caller = asyncio.create_task(cache.resolve("a.test"))
    await asleep()
    caller.cancel()
    world.gate.set()
    await asleep()
    del caller
    assert loud == []


async def test_it_keeps_no_more_than_its_size_the_newest() -> None:
    world = World()
    cache = world.cache(size=3)
    for name in ("a", "b", "c"):
        await cache.resolve(name)
    world.now += OK.ttl
    await cache.resolve("a")
    await cache.resolve("d")
    assert len(cache) == 3
    assert [cache.get(name) is OK for name in "abcd"] == [True, False, False, True]


async def test_close_ends_the_lookups_under_way() -> None:
    world = World()
    world.gate.clear()
    cache = world.cache()
    caller = asyncio.create_task(cache.resolve("a.test"))
    await asleep()
    await cache.close()
    with pytest.raises(asyncio.CancelledError):
        await caller
