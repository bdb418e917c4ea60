"""The table of refusals: what each concerns."""

import time
import timeit
from collections.abc import Callable

import pytest

from services.sender.refusals import RULES, RefusalScope, TransactionStep, refusal_scope
from services.sender.replies import Reply
from services.sender.retry_hints import retry_hint

FROM = "shop@example.org"
FROM_MAIL_ON = list(TransactionStep)


def reply(text: str) -> Reply:
    return Reply(int(text[:3]), (text[4:],))


def test_every_row_has_a_source() -> None:
    for rule in RULES:
        assert any(
            name in rule.source
            for name in (
                "RFC",
                "Gmail",
                "Exchange",
                "SendGrid",
                "SES",
                "IONOS",
                "Postfix",
                "Stalwart",
                "Exim",
            )
        ), rule


@pytest.mark.parametrize("at", FROM_MAIL_ON)
@pytest.mark.parametrize(
    "text",
    [
        "421 4.7.0 Too many messages",
        "421 4.3.2 shutting down",
        "451 4.4.2 Timeout waiting for data from client.",
        "452 4.4.5 Maximum number of messages per session exceeded",
        "451 Mails per session limit exceeded",
        "450 too many messages in one connection",
        "452 4.3.2 Connection rate limit: 100 mails per connection",
        "451 timed out waiting for a command",
        "451 4.3.0 session timeout",
    ],
)
def test_refusals_that_concern_the_session(at: TransactionStep, text: str) -> None:
    assert refusal_scope(at, reply(text)) is RefusalScope.SESSION


@pytest.mark.parametrize("at", FROM_MAIL_ON)
@pytest.mark.parametrize(
    "text", ["451 4.7.1 greylisted", "450 4.2.0 later", "451 local error", "454 4.7.1 no"]
)
def test_a_4yz_concerns_the_mail_unless_the_server_closes_with_it(at: TransactionStep, text: str) -> None:
    assert refusal_scope(at, reply(text)) is RefusalScope.MAIL
    assert refusal_scope(at, reply(text), closed=True) is RefusalScope.SESSION


@pytest.mark.parametrize("at", FROM_MAIL_ON)
@pytest.mark.parametrize(
    "text",
    [
        "530 5.7.0 Must issue a STARTTLS command first",
        "530 5.7.0 Authentication required",
        "535 5.7.8 Credentials invalid",
        "550 5.4.5 Daily user sending quota exceeded",
        "550 5.4.5 Daily SMTP relay limit exceeded for user.",
        "554 5.7.0 Your hourly limit of messages was exceeded. Try again later.",
        "554 5.7.0 Limit exceeded. Try again later.",
        "554 5.2.0 STOREDRV.Submission.Exception:SubmissionQuotaExceededException",
        "550 5.7.705 Access denied, tenant has exceeded threshold",
        # Relays also use the code of a full mailbox for a quota.
        "552 5.2.0 Daily sending quota exceeded",
        "552 5.2.2 SubmissionQuotaExceededException",
        "552 5.2.2 You have exceeded your daily sending limit",
        "552 Hourly sending limit exceeded for this account",
        "552 Daily message quota exceeded",
        "552 5.7.0 Your hourly limit of messages was exceeded",
        "552 5.4.5 Daily user sending quota exceeded",
        "550 5.2.1 outgoing message limit reached for this user",
        # A demand for AUTH, whatever the code.
        "503 This mail server requires authentication when attempting to send to a non-local e-mail address.",
        "503 5.5.1 AUTH first",
        "505 5.7.3 Client was not authenticated",
        "550 5.7.1 Authentication required",
        "550 authentication is required for relay",
        "550 5.7.1 Please authenticate first",
        "554 5.7.1 You must log in before sending",
        "553 SMTP AUTH is required",
        "554 5.7.1 <DATA>: Data command rejected: limit of 400 rcpts per 24 hours for client x reached",
        "550 Maximum credits exceeded",
        "550 You have exceeded your sending limit",
        "553 5.7.1 <shop@example.org>: Sender address rejected: not owned by user ann",
        "553 5.7.1 Sender address rejected: not owned by auth user",
        "550 5.1.8 <shop@example.org>: Sender address rejected: Domain not found",
        "550 5.1.8 Access denied, bad outbound sender",
        "550 5.7.60 SMTP; Client does not have permissions to send as this sender",
        "550 5.7.1 Client does not have permission to send as this sender",
        "554 5.2.252 SendAsDenied; ann@example.org not allowed to send as shop@example.org",
        "550 The from address does not match a verified Sender Identity.",
        "550 You are not authorized to send from that email address",
        "554 Message rejected: Email address is not verified. Identities that failed: Shop@example.org",
    ],
)
def test_refusals_that_concern_the_account(at: TransactionStep, text: str) -> None:
    assert refusal_scope(at, reply(text), FROM) is RefusalScope.ACCOUNT


@pytest.mark.parametrize("at", [TransactionStep.RCPT, TransactionStep.DATA, TransactionStep.MESSAGE])
@pytest.mark.parametrize(
    "text",
    [
        "550 5.1.1 no such user",
        "554 5.7.1 rejected",
        "554 5.7.1 Relay access denied",
        "554 5.7.0 spam score exceeds the threshold",
        "550 5.7.0 message size limit exceeded",
        # The recipient's limits.
        "552 5.2.2 The email account that you tried to reach is over quota.",
        "550 5.2.2 mailbox quota exceeded",
        "550 mailbox is over its message limit, quota exceeded",
        "550 the recipient has exceeded the limit of messages per hour",
        "552 5.2.2 The account that you tried to send to is over quota, message not sent",
        "552 user has too many messages, over quota",
        "552 5.2.2 Daily quota exceeded",
        # The recipient accepts only authenticated senders, or a signed domain.
        "550 5.7.1 RESOLVER.RST.AuthRequired; authentication required",
        "550 5.7.133 RESOLVER.RST.SenderNotAuthenticatedForGroup; authentication required",
        "550 5.7.26 This mail is not authenticated: authentication is required, by SPF or DKIM",
        # The message's size and content.
        "552 too big",
        "552 Requested mail action aborted: exceeded storage allocation",
        "552 5.7.0 Number of attachments exceeds the limit, message not sent",
        "552 5.3.4 too big",
        "554 5.3.4 message too big for system",
        "550 5.6.7 no SMTPUTF8 for this address",
        # In the sandbox the recipient must be verified too.
        "554 Message rejected: Email address is not verified. Identities that failed: ann@example.net",
    ],
)
def test_refusals_that_concern_the_mail(at: TransactionStep, text: str) -> None:
    assert refusal_scope(at, reply(text), FROM) is RefusalScope.MAIL


@pytest.mark.parametrize(
    ("text", "about"),
    [
        ("550 5.7.1 no", RefusalScope.ACCOUNT),
        ("503 5.5.1 authenticate first", RefusalScope.ACCOUNT),
        ("554 5.7.1 blocked", RefusalScope.ACCOUNT),
        ("501 5.1.7 bad sender address syntax", RefusalScope.ACCOUNT),
        ("552 5.3.4 message size exceeds the limit", RefusalScope.MAIL),
        ("552 too big", RefusalScope.MAIL),
        ("554 5.3.4 message too big", RefusalScope.MAIL),
        ("550 Message size exceeds the maximum", RefusalScope.MAIL),
        ("550 5.6.7 no SMTPUTF8", RefusalScope.MAIL),
        ("555 5.5.4 Unsupported option: SMTPUTF8", RefusalScope.MAIL),
        ("501 5.5.4 BODY=8BITMIME is not supported", RefusalScope.MAIL),
        ("504 5.5.4 SIZE=12: not implemented", RefusalScope.ACCOUNT),
        ("555 5.5.4 Unsupported option", RefusalScope.ACCOUNT),
        ("552 5.2.2 account over quota", RefusalScope.ACCOUNT),
        ("552 sending quota exceeded for today", RefusalScope.ACCOUNT),
        ("451 4.7.1 later", RefusalScope.MAIL),
        ("452 4.3.1 disk full", RefusalScope.MAIL),
    ],
)
def test_a_5yz_to_mail_concerns_the_account_unless_it_names_the_message(
    text: str, about: RefusalScope
) -> None:
    assert refusal_scope(TransactionStep.MAIL, reply(text)) is about


@pytest.mark.parametrize(
    "text",
    [
        "450 4.4.1 connection to mx.example.net timed out",
        "451 4.4.3 DNS timeout",
        "450 4.1.8 domain lookup timed out",
        "452 4.2.2 mailbox over quota",
        "450 4.2.1 the recipient takes no more messages per session",
    ],
)
def test_a_4yz_about_the_route_to_the_recipient_concerns_the_mail(text: str) -> None:
    assert refusal_scope(TransactionStep.RCPT, reply(text)) is RefusalScope.MAIL


@pytest.mark.parametrize(
    "text",
    [
        "your message is likely suspicious due to the reputation of the domain, see the page. " * 12,
        "a " * 500,
        "limit " * 170,
        "sent " + "limit " * 170,
        "exceeded " * 120,
        "sent " + "over " * 200,
        "messages quota " * 70,
        "sending " * 125,
        "1 mails " * 125,
        "in this " * 125,
        "authentication is " * 60,
        "tenant " * 150,
        "1h, and " * 125,
        "1 h 1 " * 170,
        "for " * 247 + "5 minutes",
    ],
    ids=lambda text: text[:16],
)
def test_a_long_reply_takes_less_than_20_ms_of_the_event_loop(text: str) -> None:
    def seconds(work: Callable[[], object]) -> float:
        # The thread's own time in the quickest of several runs, since others use the processor too.
        return min(timeit.repeat(work, timer=time.thread_time, number=1, repeat=7))

    assert seconds(lambda: refusal_scope(TransactionStep.RCPT, Reply(450, (text,)), FROM)) < 0.02
    assert seconds(lambda: refusal_scope(TransactionStep.RCPT, Reply(550, (text,)), FROM)) < 0.02
    assert seconds(lambda: refusal_scope(TransactionStep.RCPT, Reply(552, (text,)), FROM)) < 0.02
    assert seconds(lambda: retry_hint(Reply(450, (text,)))) < 0.02
