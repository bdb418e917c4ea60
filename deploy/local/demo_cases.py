"""The mails that the demo sends, and how the task of each must end. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["CASES", "Case", "DemoMail", "plan"]


@dataclass(frozen=True, slots=True)
class Case:
    """One way for a task to end. `address` holds `{tag}`; the catcher takes the mail `copies` times."""

    text: str
    address: str
    status: str
    reason: str = ""
    copies: int = 0


@dataclass(frozen=True, slots=True)
class DemoMail:
    """One mail of the demo: its case and its recipient."""

    case: Case
    address: str


CASES = (
    Case("a domain that takes mail", "ann+{tag}@good.test", "completed", copies=1),
    Case("a domain with an umlaut", "bea+{tag}@bücher.test", "completed", copies=1),
    Case("greylisted at first", "greylist+{tag}@good.test", "completed", copies=1),
    Case("DNS fails at first", "cem+{tag}@{tag}.flaky.test", "completed", copies=1),
    Case("the reply is lost, sent again", "drop-after+{tag}@good.test", "completed", copies=2),
    Case("no such domain", "dan+{tag}@nosuch.test", "failed", "no_such_domain"),
    Case("a domain that wants no mail", "eva+{tag}@nullmx.test", "failed", "null_mx"),
    Case("a domain without mail host", "fay+{tag}@nomail.test", "failed", "no_mail_host"),
    Case("its mail host is localhost", "gus+{tag}@localmx.test", "failed", "unusable_mx"),
    Case("its DNS stays broken", "hal+{tag}@servfail.test", "failed", "dns_unavailable"),
    Case("no such mailbox", "reject5+{tag}@good.test", "failed", "rejected"),
    Case("the message is refused", "data5+{tag}@good.test", "failed", "rejected"),
)


def plan(run: str, count: int) -> Iterator[DemoMail]:
    """Yield `count` mails of the cases in turn. `run` makes their addresses unlike those of other runs."""
    for number in range(count):
        case = CASES[number % len(CASES)]
        yield DemoMail(case, case.address.format(tag=f"{run}{number // len(CASES)}"))
