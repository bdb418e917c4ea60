"""The verdict cache: the validity of verdicts, one lookup a domain, and cancellations."""

import asyncio
from collections.abc import Callable

import pytest

from services.validator.cache import VerdictCache
from services.validator.mx import Reason, Verdict, VerdictKind

OK = Verdict(VerdictKind.OK, None, ((10, "mx.test"),), "", 60)
FAILED = Verdict(VerdictKind.FAILED, Reason.NULL_MX, (), "null MX", 30)
DARK = Verdict(VerdictKind.TRANSIENT, Reason.DNS_UNAVAILABLE, (), "SERVFAIL", 30)


class World:
    """Lookups that end when the test says so, and a clock that the test moves."""

    def __init__(self, verdict: Verdict | Callable[[str], Verdict] = OK) -> None:
        self.verdict = verdict
        self.now = 1000.0
        self.asked: list[str] = []
        self.fresh: list[bool] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def lookup(self, domain: str, fresh: bool) -> Verdict:
        self.asked.append(domain)
        self.fresh.append(fresh)
        verdict = self.verdict
        await self.gate.wait()
        return verdict(domain) if callable(verdict) else verdict

    def cache(self, *, transient_ttl: float = 30.0, size: int = 50_000) -> VerdictCache:
        return VerdictCache(self.lookup, lambda: self.now, transient_ttl=transient_ttl, size=size)


async def asleep() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize("verdict", [OK, FAILED, DARK])
async def test_a_verdict_is_valid_for_its_ttl_and_no_longer(verdict: Verdict) -> None:
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


async def test_a_transient_verdict_is_kept_for_less_than_the_shortest_retry() -> None:
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


async def test_a_text_that_is_no_domain_is_never_looked_up() -> None:
    world = World()
    verdict = await world.cache().resolve("a..b")
    assert (verdict.kind, verdict.reason) == (VerdictKind.FAILED, Reason.NO_SUCH_DOMAIN)
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


@pytest.mark.parametrize("verdict", [OK, FAILED, DARK])
async def test_with_an_age_only_a_fresh_enough_verdict_counts(verdict: Verdict) -> None:
    world = World(verdict)
    cache = world.cache()
    await cache.resolve("a.test")
    world.now += 2
    assert cache.get("a.test", 1.0) is None
    # That lookup was recent, but not fresh: it used remembered mail hosts.
    assert cache.get("a.test", 3.0) is None
    assert cache.get("a.test") is verdict
    world.verdict = OK
    assert await cache.resolve("a.test", 0.0) is OK
    assert world.fresh == [False, True]
    world.now += 2
    assert cache.get("a.test", 2.0) is cache.get("a.test") is OK
    assert cache.get("a.test", 1.9) is None


async def test_with_an_age_no_caller_waits_for_an_older_lookup() -> None:
    world = World(FAILED)
    world.gate.clear()
    cache = world.cache()
    early = asyncio.create_task(cache.resolve("a.test", 0.0))
    await asleep()
    world.now += 1
    world.verdict = OK
    late = [asyncio.create_task(cache.resolve("a.test", 0.5)) for _ in range(3)]
    await asleep()
    world.now += 1
    joined = asyncio.create_task(cache.resolve("a.test"))
    await asleep()
    world.gate.set()
    assert await early is FAILED
    assert [await task for task in (*late, joined)] == [OK] * 4
    assert world.asked == ["a.test"] * 2
    assert cache.get("a.test") is OK


async def test_a_verdict_that_comes_late_does_not_replace_one_that_was_asked_for_later() -> None:
    world = World(FAILED)
    world.gate.clear()
    cache = world.cache()
    early = asyncio.create_task(cache.resolve("a.test"))
    await asleep()
    world.now += 1
    world.verdict = OK
    gate, world.gate = world.gate, asyncio.Event()
    world.gate.set()
    assert await cache.resolve("a.test", 0.5) is OK
    gate.set()
    assert await early is FAILED
    assert cache.get("a.test") is OK


async def test_close_ends_the_lookups_that_were_replaced_too() -> None:
    world = World()
    world.gate.clear()
    cache = world.cache()
    callers = [asyncio.create_task(cache.resolve("a.test"))]
    await asleep()
    callers.append(asyncio.create_task(cache.resolve("a.test", 0.0)))
    await asleep()
    await cache.close()
    assert [type(r) for r in await asyncio.gather(*callers, return_exceptions=True)] == [
        asyncio.CancelledError
    ] * 2


async def test_close_ends_the_lookups_under_way() -> None:
    world = World()
    world.gate.clear()
    cache = world.cache()
    caller = asyncio.create_task(cache.resolve("a.test"))
    await asleep()
    await cache.close()
    with pytest.raises(asyncio.CancelledError):
        await caller
