"""What a refusal concerns: the mail, the session or the account at the relay. One table of rules. Pure."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NamedTuple

from services.sender.replies import Reply, TransactionStep

__all__ = ["RULES", "RefusalRule", "RefusalScope", "TransactionStep", "refusal_scope"]


class RefusalScope(StrEnum):
    """What a refusal concerns, and so what follows from it."""

    MAIL = "mail"
    """This mail or its recipient: the attempt ends."""
    SESSION = "session"
    """The session: it ends, and the mail goes on a new one at once."""
    ACCOUNT = "account"
    """The sender's account at the relay: all mails wait, and none loses an attempt."""


class RefusalRule(NamedTuple):
    """One row: a reply that fits all its fields has this scope. An empty pattern fits every reply."""

    scope: RefusalScope
    code: str
    """A pattern of the whole basic code."""
    enhanced: str
    """A pattern of the enhanced code (RFC 3463) without its class: subject and detail."""
    words: str
    """A pattern to find in the text, in any case. A match from any one position may span some tens of
    characters only, so that a hostile text costs little."""
    source: str
    unless: str = ""
    """A pattern that must not be in the text."""
    step: TransactionStep | None = None
    closes: bool = False
    """True: only if the server closed the connection with the reply."""
    names_sender: bool = False
    """True: only if the text names the return path."""


# Limits on these things are not about how much the account sends.
_OTHER_LIMITS = (
    r"recipient\b|receiv|mailbox|inbox|storage|disk|\bsize|large|\bbig\b|length|header|attachment|hops?\b|spam"
    r"|score"
)
_LIMIT = r"(?:quota|limits?|threshold|credits)"
_EXCEEDED = rf"{_LIMIT}\b.{{0,60}}\b(?:exceed|reached|hit\b)|(?:exceed\w*|reached|over)\b.{{0,60}}\b{_LIMIT}"
_PERIOD = r"daily|hourly|per (?:day|hour|minute)|\d+ (?:hours|minutes)|rate|credits"
_SENDING = rf"\b(?:sending|sent|send|{_PERIOD}|e?-?mails|messages)\b"
_OUTGOING = r"(?:sending|submission|outgoing|outbound)"

RULES: tuple[RefusalRule, ...] = (
    # The session.
    RefusalRule(RefusalScope.SESSION, "421", "", "", "RFC 5321 section 3.8: the server closes the channel"),
    RefusalRule(
        RefusalScope.SESSION, "4..", r"4\.2", "", "RFC 3463 X.4.2, bad connection; Gmail: 451 4.4.2 Timeout"
    ),
    RefusalRule(
        RefusalScope.SESSION,
        "4..",
        r"4\.5",
        "",
        "RFC 3463 X.4.5, congestion; Stalwart: 452 4.4.5 Maximum number of messages per session exceeded",
    ),
    RefusalRule(
        RefusalScope.SESSION,
        "4..",
        "",
        r"(?:per|in one|in this|this) (?:smtp )?(?:session|connection)",
        "IONOS: 451 Mails per session limit exceeded; Exim: too many messages in one connection",
        unless=_OTHER_LIMITS,
    ),
    RefusalRule(
        RefusalScope.SESSION,
        "4..",
        # X.4.1 and the others left out here concern the route to the recipient's host.
        r"(?!1\.|2\.|4\.[13467]).*",
        r"time(?:d)?[ -]?out",
        "RFC 5321 section 4.5.3.2: the server's own timeouts",
    ),
    RefusalRule(
        RefusalScope.SESSION,
        "4..",
        "",
        "",
        "RFC 5321 section 3.8, where the server says another code",
        closes=True,
    ),
    # The message's size and its content.
    RefusalRule(RefusalScope.MAIL, "5..", r"(?:3\.4|2\.3)", "", "RFC 3463 X.3.4 and X.2.3: message too big"),
    RefusalRule(RefusalScope.MAIL, "5..", r"6\.\d+", "", "RFC 3463 X.6.z: message content or media"),
    RefusalRule(
        RefusalScope.MAIL,
        "5..",
        "",
        r"\bSMTPUTF8\b|\b8BITMIME\b|message size|too (?:big|large)",
        "RFC 5321 section 4.1.1.11: a parameter of MAIL; these differ from mail to mail",
        unless=r"\bquota\b",
        step=TransactionStep.MAIL,
    ),
    # The account.
    RefusalRule(
        RefusalScope.ACCOUNT,
        "53[0458]",
        "",
        "",
        "RFC 4954 section 6: authentication required, or another one",
    ),
    RefusalRule(
        RefusalScope.ACCOUNT,
        "5..",
        # X.7.26 and X.7.1nn concern the message's signature and the recipient's own demands.
        r"(?!7\.\d\d).*",
        r"\b(?:authentication|auth) (?:is )?(?:required|first)|\brequires? (?:smtp )?auth(?:entication)?\b"
        r"|\bmust (?:first )?(?:be authenticated|authenticate|log ?in)\b|\b(?:authenticate|log ?in) first\b"
        r"|client was not authenticated",
        "RFC 4954 section 6, with another code; Exim: 503 This mail server requires authentication;"
        " Exchange: 530, 505 5.7.3 Client was not authenticated",
        unless=r"\b(?:SPF|DKIM|DMARC)\b|\bRESOLVER\b",
    ),
    RefusalRule(
        RefusalScope.ACCOUNT,
        "5..",
        r"4\.5",
        "",
        "RFC 3463 X.4.5, congestion; Gmail: 550 5.4.5 Daily user sending limit exceeded",
    ),
    RefusalRule(
        RefusalScope.ACCOUNT,
        "5..",
        r"7\.0",
        _EXCEEDED,
        "RFC 3463 X.7.0, a policy; relays: 554 5.7.0 limit exceeded, try again later",
        unless=_OTHER_LIMITS,
    ),
    RefusalRule(
        RefusalScope.ACCOUNT,
        # 552 also means a full mailbox, so its text must be clearer; the next rule has it.
        "5(?!52)..",
        r"(?![12]\.).*",
        rf"\A(?=.*{_SENDING})(?=.*(?:{_EXCEEDED}))"
        r"|(?:limit of|only) \d+ (?:rcpts|recipients|e?-?mails|messages)",
        "SendGrid: Maximum credits exceeded; Dovecot and Postfix policies: limit of 400 rcpts per 24 hours",
        unless=_OTHER_LIMITS,
    ),
    RefusalRule(
        RefusalScope.ACCOUNT,
        "552",
        r"(?![12]\.).*",
        rf"\A(?=.*\b(?:{_PERIOD})\b)(?=.*(?:{_EXCEEDED}))",
        "RFC 5321 section 4.2.2: exceeded allocation; relays: 552 Daily message quota exceeded",
        unless=_OTHER_LIMITS,
    ),
    RefusalRule(
        RefusalScope.ACCOUNT,
        "5..",
        r"(?!1\.).*",
        rf"\b{_OUTGOING}(?: [\w-]+){{0,2}} {_LIMIT}\b|\b{_LIMIT} (?:for|of|on) {_OUTGOING}\b",
        "RFC 3463 X.2.z, said of the sender's mailbox; relays: 552 5.2.0 Daily sending quota exceeded",
        unless=_OTHER_LIMITS,
    ),
    RefusalRule(
        RefusalScope.ACCOUNT,
        "5..",
        "",
        r"submission ?quota ?exceeded|tenant.{0,40}exceeded",
        "Exchange Online: 554 5.2.0 SubmissionQuotaExceededException, 5.7.705 tenant has exceeded threshold",
    ),
    RefusalRule(
        RefusalScope.MAIL,
        "552",
        # A mailbox that is full at MAIL is the sender's own: no recipient is named yet.
        r"(?!2\.2).*",
        "",
        "RFC 1870 section 6.1: message size exceeds the limit",
    ),
    RefusalRule(
        RefusalScope.ACCOUNT,
        "5..",
        "",
        "",
        "RFC 5321 section 3.3: MAIL names no recipient, and all mails have the same return path",
        step=TransactionStep.MAIL,
    ),
    RefusalRule(
        RefusalScope.ACCOUNT,
        "5..",
        r"1\.[78]",
        "",
        "RFC 3463 X.1.7 and X.1.8: bad sender's address; Exchange Online: 550 5.1.8 bad outbound sender",
    ),
    RefusalRule(
        RefusalScope.ACCOUNT,
        "5..",
        r"7\.(?:60|50[1-3]|70[58]|750)|2\.252",
        "",
        "Exchange Online: 5.7.60 and 5.2.252 SendAsDenied, 5.7.501 banned sender, 5.7.750 unregistered",
    ),
    RefusalRule(
        RefusalScope.ACCOUNT,
        "5..",
        "",
        r"sender address rejected|not owned by|sendasdenied|permissions? to send as"
        r"|not (?:authori[sz]ed|allowed|permitted) to send (?:mail )?(?:as|from|using)"
        r"|from address does not match|unauthenticated senders? not allowed",
        "Postfix reject_sender_login_mismatch: 553 5.7.1 Sender address rejected: not owned by user;"
        " Exchange: 550 5.7.1 Client does not have permission to send as this sender;"
        " SendGrid: 550 The from address does not match a verified Sender Identity",
    ),
    RefusalRule(
        RefusalScope.ACCOUNT,
        "5..",
        "",
        "not verified",
        "Amazon SES: 554 Message rejected: Email address is not verified, and the addresses",
        names_sender=True,
    ),
)


def refusal_scope(
    step: TransactionStep, reply: Reply, mail_from: str = "", *, closed: bool = False
) -> RefusalScope:
    """Return what a refusal concerns; the first rule that fits decides. Without one it concerns the mail.

    Args:
        step: what the server refused.
        mail_from: the return path.
        closed: whether the server closed the connection with the reply.
    """
    text = " ".join(reply.lines)[:1000]
    enhanced = (reply.enhanced or "").partition(".")[2]
    for rule in RULES:
        if (
            (rule.step is None or rule.step is step)
            and (closed or not rule.closes)
            and re.fullmatch(rule.code, str(reply.code))
            and (not rule.enhanced or re.fullmatch(rule.enhanced, enhanced))
            and (not rule.words or re.search(rule.words, text, re.IGNORECASE))
            and not (rule.unless and re.search(rule.unless, text, re.IGNORECASE))
            and not (rule.names_sender and (not mail_from or mail_from.lower() not in text.lower()))
        ):
            return rule.scope
    return RefusalScope.MAIL
