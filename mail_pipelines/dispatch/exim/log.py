"""How Exim words the journal: its main log, as `infra/exim/dispatch.conf` has it written. Read in Exim 4.96 and checked against 4.98.

A line is `<date> <time> [<pid>] [<message id>] …`, the date in UTC. What follows, and what it says of a message (the token in the
envelope sender names it):

  MARK <permit> [<server>]                        a sender greeted (our ACL); whose, where several servers share the Exim
  INTENT <token> <pid> <permit>                   the body is here (our ACL)
  >> … F=<…> … C="250 …"                          delivered: the destination's own reply
  … F=<…> rejected after DATA: … C="5…"           bounced
  … F=<…> tmp-reject from cutthrough after DATA: … C="4…"   deferred
  … F=<…> temporarily rejected after DATA: …      void: our ACL found no permit
  … F=<…> rejected RCPT <…>: …                    bounced by the reply quoted in it, or because no such domain takes mail
  … F=<…> temporarily rejected RCPT <…>: …        deferred by the reply quoted in it; without one unreachable; void: no permit
  <= <…> H=(<permit>)                             taken by Exim; after an INTENT without `>>` this means: not delivered meanwhile
  =>, ->, ** (but for those below)                the queue had to do with a message: counted as an alarm, since nothing should get there

In burst mode, where a message is in the queue before its INTENT (some lines name only Exim's own id of it):

  <= <…> H=(<permit>.<provider>)                  taken into the queue: from here on the id stands for the token
  => … F=<…> … T=burst … C="250 …"                delivered
  ** … F=<…> Q=… : …                              bounced by the reply quoted in it, or because no such domain takes mail
  == … Q=… defer (…) … : …                        deferred by the reply quoted in it; unknown after the body without one; else unreachable
  H=… […]: … end of data …                        the same, of a host behind which Exim looks at others
  VOID <token> <permit>                           our ACL found no permit
  => :blackhole: … R=withdrawn                    thrown away, since its permit is gone

An answer of several lines is one record with line breaks in it. A destination cannot forge an entry that way: each of its lines
begins with three digits and a space or hyphen, a record with a year.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from mail_pipelines.dispatch.journal import Entry, Kind, Outcome, Torn, UnknownForm
from mail_pipelines.dispatch.replies import outcome_of

# 16 characters up to 4.96, 23 from 4.97 on.
_MESSAGE_ID = rb"[0-9A-Za-z]{6}-(?:[0-9A-Za-z]{6}-[0-9A-Za-z]{2}|[0-9A-Za-z]{11}-[0-9A-Za-z]{4})"
_STAMP = rb"2\d\d\d-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d{1,6})?"
_HEAD = _STAMP + rb"(?: [+-]\d{4})?(?: \[\d{1,10}\])? (?:" + _MESSAGE_ID + rb" )?"
# With the process, which the beginning of every record of ours names.
_SECOND = re.compile(_STAMP + rb"(?: [+-]\d{4})? \[\d{1,10}\] ")
# What an INTENT or a MARK is known by, wherever it stands in joined lines.
_OWN = re.compile(rb"INTENT ([a-z2-7]{48}) \d|MARK (c\d+\.\d+)(?: ([a-z0-9-]+))?\Z")
_ANY_TOKEN = re.compile(rb"(?<![a-z2-7])[a-z2-7]{48}(?![a-z2-7])")
# The process of an INTENT that may be forged: one that does not live, so that nobody waits for it.
_NO_PROCESS = 0
# Octets of a stamp up to the month.
_YEAR = 5
_RECORD = re.compile(_STAMP + rb"(?: [+-]\d{4})?(?: \[\d{1,10}\])? (?:(" + _MESSAGE_ID + rb") )?(.*)", re.DOTALL)
_MARK = re.compile(rb"MARK (c\d+\.\d+)(?: ([a-z0-9-]+))?")
_PERMIT = rb"c\d+\.\d+"
# Logs of before it have no permit there.
_INTENT = re.compile(rb"INTENT ([a-z2-7]{48}) (\d{1,10})(?: (" + _PERMIT + rb"))?")
# Whoever sends to us says it as its name.
_GREETED = re.compile(rb"H=\((" + _PERMIT + rb")[.)]")
_TOKEN = rb"[a-z]\+([a-z2-7]{48})@[^> \n]*"
_DELIVERY = re.compile(rb"(?:>>|=>|->|\*\*|==) .*? F=<" + _TOKEN + rb"> ", re.DOTALL)
_REFUSAL = re.compile(
    rb" ?F=<"
    + _TOKEN
    + rb"> (rejected RCPT|temporarily rejected RCPT|rejected after DATA|temporarily rejected after DATA|tmp-reject from cutthrough after DATA)"
    rb"(?: <[^>]*>)?: (.*)",
    re.DOTALL,
)
# The four lines of a message that is delivered, by one expression: nearly all of a log is made of them.
_ORDINARY = re.compile(
    _HEAD
    + rb"(?:"
    + _INTENT.pattern
    + rb"|>> [^<>\"\n]*F=<"
    + _TOKEN
    + rb'> [^"\n]* C="(2\d\d) ([^"\\\n]*)"[^"\n]*|<= '
    + _TOKEN
    + rb" H=\(("
    + _PERMIT
    + rb")\) [^\n]*|(Completed))"
)
_LAST_OF_INTENT, _LAST_OF_DELIVERY, _LAST_OF_ARRIVAL, _LAST_OF_COMPLETED = (2, 3), 6, 8, 9
# Nothing in them comes from elsewhere, so they cannot hide the torn beginning of another line.
_CANNOT_QUOTE = (*_LAST_OF_INTENT, _LAST_OF_COMPLETED)
# The same in a block. A line that the next one continues is a longer record, and not ordinary.
_ORDINARY_LINES = re.compile(rb"^" + _ORDINARY.pattern + rb"\n(?!\d\d\d[ -])", re.MULTILINE)
_START = re.compile(rb"exim \S+ daemon started: pid=")
# Behind these the words of a destination may follow.
_MAY_QUOTE = (b'"', b"reject", b"SMTP error", b"response to")
_CONFIRMATION = re.compile(rb' C="((?:[^"\\]|\\.)*)', re.DOTALL)
# The same to its end. In a torn record the next quotation mark is that of the record behind it, with an answer after it.
_QUOTED = re.compile(_CONFIRMATION.pattern + rb'"(?= |$)', re.DOTALL)
_ESCAPED = re.compile(rb"\\(.)", re.DOTALL)
# What Exim says of a callout that got an answer. Up to MAIL it is an answer to us, not to the message.
_ANSWER = re.compile(rb'(?:SMTP error from remote mail server after (.*?)|response to "(.*?)" was): (\d{3}[ -].*)', re.DOTALL)
_OF_THE_MESSAGE = (b"MAIL FROM", b"RCPT TO", b"pipelined MAIL FROM", b"pipelined RCPT TO", b"DATA", b"pipelined DATA", b"end of data")
# What Exim says of a connection that broke after the body.
_NO_ANSWER = re.compile(rb"(?:SMTP timeout after|Remote host closed connection in response to|Malformed SMTP reply in response to) end of data")
_END_OF_DATA = re.compile(rb"SMTP error from remote mail server after end of data: ")
_VOID = re.compile(rb"VOID ([a-z2-7]{48})(?: (" + _PERMIT + rb"))?")
_QUEUED = re.compile(rb"<= " + _TOKEN + rb" H=\((" + _PERMIT + rb")\.[a-z0-9_-]+\) ")
_SENT = re.compile(rb"=> .*? F=<" + _TOKEN + rb"> Q=\S+ R=\S+ T=burst H=", re.DOTALL)
_TRIED = rb"(?: [RT]=\S+)*(?: H=\S+ \[[^\]]*\](?::\d+)?\*?(?: (?:X|CV|I)=\S+)*)?"
_FAILED = re.compile(rb"\*\* .*? F=<" + _TOKEN + rb"> Q=\S+" + _TRIED + rb": (.*)", re.DOTALL)
_DEFERRED = re.compile(rb"== \S+ Q=\S+(?: [RT]=\S+)*(?: routing)? defer \(-?\d+\)" + _TRIED + rb": (.*)", re.DOTALL)
# Of a host that was tried. Whoever sends to us is named in brackets.
_HOST = re.compile(rb"H=[^\s()]+ \[[^\]]*\](?::\d+)?\*?:? (?!F=<)(.*)", re.DOTALL)
# Lines of the queue that say nothing: looked up only, the gate said no, what follows `==`, what the first two routers throw away; and what a
# delivery says that wanted to go on with a message when another one had just ended it.
_NOT_TRIED = (b"SMTP delivery explicitly queued", b"first-pass only routing", b"failed to expand ")
_NOTHING = re.compile(
    rb"\*\* \S+: retry timeout exceeded|\S+: error ignored|=> :blackhole: .* R=(?:withdrawn|notices)(?: .*)?|Spool(?: Q=\S+)? file \S+-[DH] not found"
)
_LINE_BREAK = re.compile(r"(?:\n|\\n)(?=\d{3}[ -])")
_ALARMS = (b"=> ", b"-> ", b"** ")
# What Exim says of a domain whose DNS leads to no host that takes mail, and what that is called (RFC 3463, RFC 7505).
_NO_ROUTE = {
    "an MX or SRV record indicated no SMTP service": "5.1.10",
    "all relevant MX records point to non-existent hosts": "5.4.4",
    "lowest numbered MX record points to local host": "5.4.4",
    "remote host address is the local host": "5.4.4",
}
_NO_PERMIT = Outcome(Kind.VOID, 451, "4.7.0", "no permit")
_NOT_DELIVERED = Outcome(Kind.DEFERRED, text="the destination refused the body or broke off before its end")


def continues(line: bytes) -> bool:
    """Whether a line is the next one of the answer that the record before it quotes."""
    return line[3:4] in (b" ", b"-") and line[:3].isdigit()


def parse(record: bytes) -> Entry | None:
    """The entry of a record; None for one that says nothing about a message.

    Raises `UnknownForm` for a whole record that is none of these, `Torn` where lines are joined and it is not certain which words are whose,
    and another `ValueError` for what is no record.
    """
    if not record:
        return None
    ordinary = _ORDINARY.fullmatch(record)
    if ordinary is not None and (ordinary.lastindex in _CANNOT_QUOTE or not _may_hide_another(record)):
        return _ordinary(ordinary)
    if (second := _SECOND.search(_QUOTED.sub(_blanked, record), 1)) is not None:
        return parse(_behind_torn(record, second.start()))
    found = _RECORD.fullmatch(record)
    if found is None:
        raise ValueError(f"not a record of Exim's log: {record[:40]!r}")
    rest: bytes = found[2]
    if rest.startswith((b"INTENT ", b"MARK ", b"VOID ")):
        return _own(rest)
    if b"INTENT " in rest:
        # In the words of a destination, or of nobody we know.
        raise _torn(record, "an INTENT inside another record")
    flag = rest[:3]
    if flag == b">> ":
        return Entry(_sender(rest), outcome=_confirmed(rest))
    of_queue, entry = _of_the_queue((found[1] or b"").decode(), rest)
    if of_queue or flag in (b"<= ", b"== ") or _START.match(rest):
        return entry
    if flag in _ALARMS:
        return Entry(alarm=True)
    if (refusal := _REFUSAL.search(rest)) is not None:
        greeted = _GREETED.match(rest)
        return Entry(refusal[1].decode(), outcome=_refused(refusal[2], refusal[3]), permit=greeted[1].decode() if greeted else "")
    raise UnknownForm


def _of_the_queue(message: str, rest: bytes) -> tuple[bool, Entry | None]:
    """Whether a line is one of burst mode, and what it says, if it says something; `message` is Exim's id."""
    if (queued := _QUEUED.match(rest)) is not None:
        return True, Entry(queued[1].decode(), message=message, permit=queued[2].decode())
    if (sent := _SENT.match(rest)) is not None:
        return True, Entry(sent[1].decode(), outcome=_confirmed(rest), message=message)
    if (failed := _FAILED.match(rest)) is not None:
        return True, _ended(failed[2], message)._replace(token=failed[1].decode())
    if (deferred := _DEFERRED.match(rest)) is not None:
        return True, None if deferred[1].startswith(_NOT_TRIED) else _ended(deferred[1], message)
    if (host := _HOST.fullmatch(rest)) is not None:
        told = message and (_NO_ANSWER.match(host[1]) or _END_OF_DATA.match(host[1]))
        return True, _ended(host[1], message) if told else None
    return _NOTHING.fullmatch(rest) is not None, None


def _may_hide_another(record: bytes) -> bool:
    return b"INTENT " in record or record.find(record[:_YEAR], _YEAR) >= 0


def _blanked(quoted: re.Match[bytes]) -> bytes:
    return b" " * len(quoted[0])


def _behind_torn(record: bytes, start: int) -> bytes:
    """The record behind a torn one. A process that could not end its line (the disk is full) has ended there and then; what it left says nothing.

    Raises `Torn` where the torn part may be the words of a destination, which could forge what stands behind it.
    """
    torn = record[:start]
    if any(sign in torn for sign in _MAY_QUOTE):
        raise _torn(record, "a record inside another one")
    return record[start:]


def _torn(record: bytes, what: str) -> Torn:
    """What joined lines say whoever's words they are. A forged INTENT makes a message doubtful that went to the forger; a permit's name no one else knows."""
    own = [
        Entry(found[1].decode(), intent_pid=_NO_PROCESS) if found[1] else Entry(mark=found[2].decode(), server=(found[3] or b"").decode())
        for found in _OWN.finditer(record)
    ]
    return Torn(what, (token.decode() for token in _ANY_TOKEN.findall(record)), own)


def scan(block: bytes) -> Iterator[tuple[int, int, Entry | None]]:
    """The ordinary records of a block of whole records, as `parse` reads them, with their places."""
    for found in _ORDINARY_LINES.finditer(block):
        start, end = found.span()
        if found.lastindex in _CANNOT_QUOTE or not _may_hide_another(block[start:end]):
            yield start, end, _ordinary(found)


def _ordinary(found: re.Match[bytes]) -> Entry | None:
    """The entry of a match of `_ORDINARY`; the last group that took part tells which of the four lines it is."""
    last = found.lastindex
    if last in _LAST_OF_INTENT:
        return Entry(found[1].decode(), intent_pid=int(found[2]), permit=(found[3] or b"").decode())
    if last == _LAST_OF_DELIVERY:
        return Entry(found[4].decode(), outcome=outcome_of(int(found[5]), found[6].decode("utf-8", "replace")))
    if last == _LAST_OF_ARRIVAL:
        return Entry(found[7].decode(), outcome=_NOT_DELIVERED, unless_known=True, permit=found[8].decode())
    return None


def _own(rest: bytes) -> Entry:
    """A line that our ACLs write."""
    if (intent := _INTENT.fullmatch(rest)) is not None:
        return Entry(intent[1].decode(), intent_pid=int(intent[2]), permit=(intent[3] or b"").decode())
    if (mark := _MARK.fullmatch(rest)) is not None:
        return Entry(mark=mark[1].decode(), server=(mark[2] or b"").decode())
    if (void := _VOID.fullmatch(rest)) is not None:
        return Entry(void[1].decode(), outcome=_NO_PERMIT, permit=(void[2] or b"").decode())
    raise ValueError(f"neither MARK nor INTENT nor VOID: {rest[:40]!r}")


def _sender(rest: bytes) -> str:
    found = _DELIVERY.match(rest)
    if found is None:
        raise ValueError(f"a delivery without our token in F=<…>: {rest[:2]!r}")
    return found[1].decode()


def _confirmed(rest: bytes) -> Outcome:
    """The outcome by the answer in `C="…"`."""
    found = _CONFIRMATION.search(rest)
    if found is None:
        raise ValueError("no answer in C=…")
    return _answer(_ESCAPED.sub(rb"\1", found[1]))


def _refused(stage: bytes, reason: bytes) -> Outcome:
    if stage in (b"rejected after DATA", b"tmp-reject from cutthrough after DATA"):
        return _confirmed(b" " + reason)
    if stage == b"temporarily rejected after DATA" or reason.startswith((b"no permit", b"failed to expand")):
        # Our own server's words: the destination was not asked for this message, or has not got its final dot.
        return _NO_PERMIT
    if (quoted := _ANSWER.search(reason)) is not None:
        return _quoted(quoted)
    text = reason.decode("utf-8", "replace")
    if stage == b"temporarily rejected RCPT":
        return Outcome(Kind.UNREACHABLE, text=text)
    # Otherwise maybe a fault of ours, which must not bounce everybody: the sender stops and shows the words.
    return _no_such_domain(text) or Outcome(Kind.VOID, 550, text=text)


def _ended(reason: bytes, message: str) -> Entry:
    """A delivery from the queue that did not succeed, of the message that Exim calls `message`."""
    if _NO_ANSWER.match(reason) is not None:
        return Entry(outcome=Outcome(Kind.UNKNOWN, text=reason.decode("utf-8", "replace")), message=message)
    if (quoted := _ANSWER.match(reason)) is not None:
        return Entry(outcome=_quoted(quoted), message=message, early=not (quoted[1] or quoted[2]).startswith(b"end of data"))
    # Otherwise no destination was asked, unless there is an INTENT: that is for `Evidence.take` to see.
    text = reason.decode("utf-8", "replace")
    return Entry(outcome=_no_such_domain(text) or Outcome(Kind.UNREACHABLE, text=text), message=message, early=True)


def _quoted(found: re.Match[bytes]) -> Outcome:
    """The outcome by a match of `_ANSWER`."""
    answer = _answer(found[3])
    if (found[1] or found[2]).startswith(_OF_THE_MESSAGE) or answer.kind is Kind.DEFERRED:
        return answer
    # A host that talks to none of us now: a matter of this server, not of the recipient.
    return Outcome(Kind.DEFERRED, answer.code, answer.enhanced, answer.text)


def _no_such_domain(text: str) -> Outcome | None:
    """The bounce of a domain whose DNS says that it takes no mail."""
    if text.startswith("5.1.2 "):
        return outcome_of(550, text)
    return Outcome(Kind.BOUNCED, 550, _NO_ROUTE[text], text) if text in _NO_ROUTE else None


def _answer(quoted: bytes) -> Outcome:
    """An answer of one or several lines, each with its code and maybe an enhanced code, as an outcome with one line of text."""
    lines = _LINE_BREAK.split(quoted.decode("utf-8", "replace").rstrip("\n"))
    first = lines[0]
    if not first[:3].isdigit():
        raise ValueError("no code in an answer")
    enhanced = outcome_of(int(first[:3]), first[4:]).enhanced or ""
    words = [line[4:].removeprefix(enhanced).strip() for line in lines]
    return outcome_of(int(first[:3]), " ".join(filter(None, [enhanced, *words])))
