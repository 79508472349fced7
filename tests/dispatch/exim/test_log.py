"""Exim's main log as proof: every form it takes is read as what it says, and no damage passes for silence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mail_pipelines.dispatch.exim import log
from mail_pipelines.dispatch.journal import Entry, Evidence, Journal, Kind, Outcome, Position, Torn, UnknownForm

TOKEN = "mfrggzdfmztwq2lknnwg23tpobyxe43uov3ho6dzpj2gk3tf"
SENDER = f"b+{TOKEN}@bounces.example.test"
HOST = "H=(c77.1795522639) [127.0.0.1]"
REMOTE = "127.0.0.1 [127.0.0.1] : SMTP error from remote mail server after"
VERIFY = "Could not complete recipient verify callout"
NOT_TAKEN = "the destination refused the body or broke off before its end"
# The two lengths of Exim's message ids: up to 4.96, and from 4.97 on.
IDS = ("1xVpQB-0005at-08", "1xVpQB-00000000at5-08Ab")


def line(rest: str, message_id: str = "", stamp: str = "2026-11-24 12:15:42.927 [23506]") -> bytes:
    return " ".join(filter(None, [stamp, message_id, rest])).encode()


def outcome(record: bytes) -> Outcome:
    entry = log.parse(record)
    assert entry is not None
    assert entry.outcome is not None
    assert entry.token == TOKEN
    return entry.outcome


def write(path: Path, *records: bytes) -> Evidence:
    """A claim's evidence in a log of these records, with its marker first."""
    path.write_bytes(b"".join(record + b"\n" for record in (line("MARK c77.99"), *records)))
    return Journal(path, log.parse, log.continues).evidence(Position(path.stat().st_ino, 0), 77)


INTENT = line(f"INTENT {TOKEN} 23506 c77.1795522639", IDS[0])
DELIVERED = line(f'>> p@x.test F=<{SENDER}> R=given_hosts T=onward H=mx.x.test [192.0.2.1] C="250 2.0.0 Ok: kept" QT=0.100s', IDS[0])
ARRIVED = line(f"<= {SENDER} {HOST} P=esmtp S=319", IDS[0])


@pytest.mark.parametrize("message_id", IDS)
@pytest.mark.parametrize("stamp", ["2026-11-24 12:15:42.927 [23506]", "2026-11-24 12:15:42", "2026-11-24 12:15:42 +0000 [1]"])
def test_both_lengths_of_ids_and_all_stamps_are_read(message_id: str, stamp: str) -> None:
    assert log.parse(line(f"INTENT {TOKEN} 23506 c1.99", message_id, stamp)) == Entry(TOKEN, intent_pid=23506, permit="c1.99")
    # As it was before 2026-12.
    assert log.parse(line(f"INTENT {TOKEN} 23506", message_id, stamp)) == Entry(TOKEN, intent_pid=23506)
    record = line(f'>> p@x.test F=<{SENDER}> R=r T=t H=mx [192.0.2.1] C="250 ok"', message_id, stamp)
    assert outcome(record) == Outcome(Kind.DELIVERED, 250, None, "ok")


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        # After the body: the destination's own reply.
        (f'{HOST} p@x.test F=<{SENDER}> rejected after DATA: R=r T=t H=mx [192.0.2.1] C="554 5.7.1 no" QT=0s', (Kind.BOUNCED, 554, "5.7.1", "no")),
        (f'{HOST} p@x.test F=<{SENDER}> tmp-reject from cutthrough after DATA: R=r C="421 4.7.0 later"', (Kind.DEFERRED, 421, "4.7.0", "later")),
        # At RCPT and MAIL: an answer to this message.
        (f"{HOST} F=<{SENDER}> rejected RCPT <p@x.test>: {REMOTE} RCPT TO:<p@x.test>: 550 5.1.1 unknown", (Kind.BOUNCED, 550, "5.1.1", "unknown")),
        (f'{HOST} F=<{SENDER}> rejected RCPT <p@x.test>: mx [192.0.2.1] : response to "MAIL FROM:<{SENDER}>" was: 550 no', (Kind.BOUNCED, 550, None, "no")),
        (
            f"{HOST} F=<{SENDER}> temporarily rejected RCPT <p@x.test>: {VERIFY}: {REMOTE} RCPT TO:<p@x.test>: 451 4.7.1 grey",
            (Kind.DEFERRED, 451, "4.7.1", "grey"),
        ),
        # Before it: an answer to this server, whatever its code.
        (f"{HOST} F=<{SENDER}> rejected RCPT <p@x.test>: {REMOTE} initial connection: 554 5.7.1 blocked", (Kind.DEFERRED, 554, "5.7.1", "blocked")),
        (f"{HOST} F=<{SENDER}> rejected RCPT <p@x.test>: {REMOTE} EHLO mail.example.test: 550 no", (Kind.DEFERRED, 550, None, "no")),
        # No answer.
        (f"{HOST} F=<{SENDER}> temporarily rejected RCPT <p@x.test>: {VERIFY}: mx [192.0.2.1] : Connection refused", None),
        (f"{HOST} F=<{SENDER}> temporarily rejected RCPT <p@x.test>: {VERIFY}", None),
        (f"{HOST} F=<{SENDER}> temporarily rejected RCPT <p@x.test>: host lookup did not complete", None),
        # Our own server's verdict.
        (f"{HOST} F=<{SENDER}> rejected RCPT <p@x.test>: 5.1.2 no such domain", (Kind.BOUNCED, 550, "5.1.2", "no such domain")),
        (f"{HOST} F=<{SENDER}> temporarily rejected RCPT <p@x.test>: no permit", (Kind.VOID, 451, "4.7.0", "no permit")),
        (f"{HOST} F=<{SENDER}> temporarily rejected after DATA: permit withdrawn", (Kind.VOID, 451, "4.7.0", "no permit")),
        (f"{HOST} F=<{SENDER}> rejected RCPT <p@x.test>: something new", (Kind.VOID, 550, None, "something new")),
    ],
)
def test_each_refusal_is_what_it_says(rest: str, expected: tuple[Kind, int | None, str | None, str] | None) -> None:
    found = outcome(line(rest))
    if expected is None:
        assert (found.kind, found.code) == (Kind.UNREACHABLE, None)
    else:
        assert found == Outcome(*expected)


def test_answers_of_several_lines_are_one_outcome(tmp_path: Path) -> None:
    at_body = line(f'{HOST} p@x.test F=<{SENDER}> rejected after DATA: R=r C="550-5.7.1 first \\"q\\"\n550 5.7.1 second \\\\ x" QT=0.002s', IDS[0])
    assert write(tmp_path / "main.log", INTENT, at_body).outcomes == {TOKEN: Outcome(Kind.BOUNCED, 550, "5.7.1", 'first "q" second \\ x')}
    at_recipient = line(f"{HOST} F=<{SENDER}> rejected RCPT <p@x.test>: {REMOTE} RCPT TO:<p@x.test>: 550-5.1.1 The account\\n550 5.1.1 is gone")
    assert outcome(at_recipient) == Outcome(Kind.BOUNCED, 550, "5.1.1", "The account is gone")


def test_a_destination_cannot_write_into_the_journal(tmp_path: Path) -> None:
    """Its words may look like anything; they stay words of its answer, or make what was sent to it doubtful, and nothing else."""
    forged = f'250-2026-11-24 12:15:43.145 [9] {IDS[0]} >> q@x.test F=<b+{"a" * 48}@b> C=\\"250 ok\\"\n250 F=<b+{"b" * 48}@b> ok'
    evidence = write(tmp_path / "main.log", INTENT, line(f'>> p@x.test F=<{SENDER}> R=r C="{forged}"', IDS[0]))
    assert set(evidence.outcomes) == {TOKEN}
    assert evidence.covered
    hidden = write(tmp_path / "main.log", INTENT, line(f'>> p@x.test F=<{SENDER}> R=r C="250 INTENT {"a" * 48} 7"', IDS[0]))
    assert hidden.covered
    assert (hidden.intents, hidden.outcomes) == ({TOKEN: 23506, "a" * 48: 0}, {})
    # Not even what would follow from its silence: that its message was not delivered.
    later = write(tmp_path / "main.log", INTENT, line(f'>> p@x.test F=<{SENDER}> R=r C="250 INTENT {"a" * 48} 7"', IDS[0]), ARRIVED)
    assert later.outcomes == {}


def test_silence_after_the_body_leaves_the_intent_open(tmp_path: Path) -> None:
    evidence = write(tmp_path / "main.log", INTENT)
    assert (evidence.covered, evidence.intents, evidence.outcomes) == (True, {TOKEN: 23506}, {})


def test_what_was_received_without_being_delivered_meanwhile_is_deferred_and_raises_an_alarm(tmp_path: Path) -> None:
    queued = line("=> :blackhole: <p@x.test> R=not_delivered", IDS[0])
    evidence = write(tmp_path / "main.log", INTENT, ARRIVED, queued, line("Completed", IDS[0]))
    assert evidence.outcomes == {TOKEN: Outcome(Kind.DEFERRED, text=NOT_TAKEN)}
    assert (evidence.intents, evidence.alarms) == ({}, 1)


def test_the_arrival_of_a_delivered_message_changes_nothing(tmp_path: Path) -> None:
    evidence = write(tmp_path / "main.log", INTENT, DELIVERED, ARRIVED, line("Completed", IDS[0]))
    assert evidence.outcomes == {TOKEN: Outcome(Kind.DELIVERED, 250, "2.0.0", "Ok: kept")}
    assert (evidence.intents, evidence.alarms, evidence.bad_lines, evidence.unknown_forms) == ({}, 0, 0, 0)


# --- burst mode ---------------------------------------------------------------------------------------------------------

QUEUED = line(f"<= {SENDER} H=(c77.1795522639.google) [127.0.0.1] P=esmtp S=319 Q=google", IDS[0])
AT = "Q=google R=queued_to_given_hosts T=burst"
MX = "H=mx.x.test [192.0.2.1]"
IGNORED = (line("** p@x.test: retry timeout exceeded", IDS[0]), line("p@x.test: error ignored", IDS[0]), line("Completed", IDS[0]))
LATER = "SMTP error from remote mail server after RCPT TO:<p@x.test>: 451-4.7.1 Grey\\n451 4.7.1 listed"


@pytest.mark.parametrize("message_id", IDS)
@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        (f'=> p@x.test F=<{SENDER}> {AT} {MX}* X=TLS1.3:ECDHE:256 CV=no C="250 2.0.0 Ok: kept" QT=1s', (Kind.DELIVERED, 250, "2.0.0", "Ok: kept")),
        (
            f"** p@x.test F=<{SENDER}> {AT} {MX}* X=TLS1.3:ECDHE:256 CV=no: SMTP error from remote mail server after RCPT TO:<p@x.test>: 550 5.1.1 no",
            (Kind.BOUNCED, 550, "5.1.1", "no"),
        ),
        (
            f"** p@x.test F=<{SENDER}> {AT} {MX}: SMTP error from remote mail server after pipelined MAIL FROM:<{SENDER}>: 550 no",
            (Kind.BOUNCED, 550, None, "no"),
        ),
        (
            f"** p@x.test F=<{SENDER}> {AT} {MX}: SMTP error from remote mail server after end of data: 554-5.7.1 a\\n554 5.7.1 b",
            (Kind.BOUNCED, 554, "5.7.1", "a b"),
        ),
        (f"** p@x.test F=<{SENDER}> Q=google R=queued_to_mail_exchangers: 5.1.2 no such domain", (Kind.BOUNCED, 550, "5.1.2", "no such domain")),
        (
            f"** p@x.test F=<{SENDER}> Q=google R=queued_to_mail_exchangers: an MX or SRV record indicated no SMTP service",
            (Kind.BOUNCED, 550, "5.1.10", "an MX or SRV record indicated no SMTP service"),
        ),
        (f"** p@x.test F=<{SENDER}> {AT}: something new", (Kind.UNREACHABLE, None, None, "something new")),
        (f"== p@x.test {AT} defer (-44) {MX}*: {LATER}", (Kind.DEFERRED, 451, "4.7.1", "Grey listed")),
        (f"== p@x.test {AT} defer (-45) {MX}: SMTP error from remote mail server after initial connection: 554 no", (Kind.DEFERRED, 554, None, "no")),
        (f"== p@x.test {AT} defer (111): Connection refused", (Kind.UNREACHABLE, None, None, "Connection refused")),
        (
            "== p@x.test Q=google R=queued_to_mail_exchangers defer (-1): host lookup did not complete",
            (Kind.UNREACHABLE, None, None, "host lookup did not complete"),
        ),
        ("== p@x.test Q=google routing defer (-51): retry time not reached", (Kind.UNREACHABLE, None, None, "retry time not reached")),
        (f"{MX}: SMTP error from remote mail server after end of data: 451 4.3.0 later", (Kind.DEFERRED, 451, "4.3.0", "later")),
    ],
)
def test_each_line_of_the_queue_is_what_it_says(tmp_path: Path, rest: str, expected: tuple[Kind, int | None, str | None, str], message_id: str) -> None:
    """By its token, or by the id that the arrival gave it."""
    evidence = write(tmp_path / "main.log", *(record.replace(IDS[0].encode(), message_id.encode()) for record in (QUEUED, line(rest, IDS[0]), *IGNORED)))
    assert evidence.outcomes == {TOKEN: Outcome(*expected)}
    assert (evidence.alarms, evidence.bad_lines, evidence.unknown_forms, evidence.covered) == (0, 0, 0, True)


@pytest.mark.parametrize(
    "reason",
    [
        "SMTP timeout after end of data",
        "Remote host closed connection in response to end of data",
        "Malformed SMTP reply in response to end of data: 2what",
        "SMTP timeout after sending data block (8192 bytes written)",
        "smtp transport process returned non-zero status 0x0009: terminated by signal 9",
        "Connection refused",
        "Connection timed out",
    ],
)
def test_after_the_body_no_answer_is_a_doubt(tmp_path: Path, reason: str) -> None:
    evidence = write(tmp_path / "main.log", QUEUED, INTENT, line(f"== p@x.test {AT} defer (-18) {MX}: {reason}", IDS[0]), *IGNORED)
    assert evidence.outcomes == {TOKEN: Outcome(Kind.UNKNOWN, text=reason)}
    # What another host says next finds it still.
    assert (list(evidence.intents), evidence.alarms, evidence.unknown_forms) == ([TOKEN], 0, 0)


@pytest.mark.parametrize(
    "then",
    [
        "failed to expand authenticated_sender: x",
        "failed to expand headers_add or headers_remove: x",
        "Connection refused",
        "SMTP error from remote mail server after initial connection: 421 4.7.0 busy",
        "SMTP error from remote mail server after initial connection: 554 5.7.1 not you",
        "SMTP error from remote mail server after EHLO mx1.shop.test: 450 4.7.0 later",
        "SMTP error from remote mail server after pipelined MAIL FROM:<b@shop.test>: 450 4.7.0 later",
    ],
)
@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("SMTP error from remote mail server after end of data: 451 4.3.0 later", Outcome(Kind.DEFERRED, 451, "4.3.0", "later")),
        ("Remote host closed connection in response to end of data", Outcome(Kind.UNKNOWN, text="Remote host closed connection in response to end of data")),
    ],
)
def test_what_the_first_host_said_of_the_body_stays_whatever_the_next_does(tmp_path: Path, said: str, expected: Outcome, then: str) -> None:
    after = line(f"== p@x.test {AT} defer (-27) H=mx2.x.test [192.0.2.2]: {then}", IDS[0])
    evidence = write(tmp_path / "main.log", QUEUED, INTENT, line(f"{MX}: {said}", IDS[0]), after, *IGNORED)
    assert evidence.outcomes == {TOKEN: expected}
    # Nor where the audit reads what came first and what came then one after the other.
    evidence = write(tmp_path / "main.log", QUEUED, INTENT, line(f"{MX}: {said}", IDS[0]))
    later = Evidence(intents=evidence.intents, messages=evidence.messages)
    entry = log.parse(after)
    assert entry is not None or then.startswith("failed to expand")
    if entry is not None and expected.kind is Kind.UNKNOWN:
        taken = later.take(entry)
        assert taken is not None
        assert taken.kind is Kind.UNKNOWN


@pytest.mark.parametrize(
    "rest",
    [
        f"== p@x.test {AT} defer (0): SMTP delivery explicitly queued",
        f"== p@x.test {AT} defer (0): first-pass only routing due to -odqs, queue_smtp_domains or control=queue",
        f"== p@x.test {AT} defer (-27): failed to expand authenticated_sender: error in expression evaluation",
        f"{MX}: {LATER}",
        f"{MX} Connection refused",
        "=> :blackhole: <p@x.test> R=withdrawn",
        f"=> :blackhole: <{SENDER}> R=notices",
        f"Spool Q=google file {IDS[0]}-D not found",
    ],
)
def test_in_the_queue_nothing_has_happened_yet(tmp_path: Path, rest: str) -> None:
    evidence = write(tmp_path / "main.log", QUEUED, line(rest, IDS[0]))
    assert (evidence.outcomes, evidence.intents, evidence.covered) == ({}, {}, True)
    assert (evidence.alarms, evidence.unknown_forms) == (0, 0)
    # Nor does it end a doubt.
    evidence = write(tmp_path / "main.log", QUEUED, INTENT, line(rest, IDS[0]))
    assert (evidence.outcomes, list(evidence.intents)) == ({}, [TOKEN])


def test_a_message_in_the_queue_is_not_one_that_was_not_delivered_meanwhile(tmp_path: Path) -> None:
    """Where an earlier offer has left a doubt that somebody decided to ignore."""
    evidence = write(tmp_path / "main.log", INTENT, QUEUED)
    assert (evidence.outcomes, evidence.intents) == ({}, {TOKEN: 23506})


def test_a_permit_that_was_gone_after_the_intent_means_that_nothing_went_out(tmp_path: Path) -> None:
    evidence = write(tmp_path / "main.log", QUEUED, INTENT, line(f"VOID {TOKEN}", IDS[0]))
    assert (evidence.outcomes[TOKEN].kind, evidence.intents) == (Kind.VOID, {})


def test_a_delivery_from_the_queue_is_an_alarm_where_there_should_be_none(tmp_path: Path) -> None:
    lines = (
        line(f'=> p@x.test F=<{SENDER}> R=given_hosts T=onward {MX} C="250 ok"', IDS[0]),
        line("=> :blackhole: <p@x.test> R=not_delivered", IDS[0]),
        line(f"** p@x.test F=<{SENDER}> R=given_hosts T=onward: x", IDS[0]),
        line(f"-> p@x.test F=<{SENDER}> {AT} {MX}", IDS[0]),
    )
    assert write(tmp_path / "main.log", *lines).alarms == len(lines)


def test_a_line_without_a_token_of_an_id_that_is_not_ours_says_nothing(tmp_path: Path) -> None:
    evidence = write(tmp_path / "main.log", INTENT, line(f"== p@x.test {AT} defer (-44) {MX}*: {LATER}", IDS[0]))
    assert (evidence.outcomes, evidence.intents) == ({}, {TOKEN: 23506})


@pytest.mark.parametrize(
    "head", [f"== p@x.test {AT} defer (-44) {MX}*: ", f"{MX}: ", f"** p@x.test F=<{SENDER}> {AT} {MX}: "], ids=["deferred", "host", "failed"]
)
def test_a_destination_cannot_write_into_the_lines_of_the_queue(tmp_path: Path, head: str) -> None:
    other = f"b+{'a' * 48}@b"
    forged = (
        f'F=<{other}> rejected after DATA: C="550 no"',
        f"{HOST} F=<{other}> rejected RCPT <p@x.test>: {REMOTE} RCPT TO:<p@x.test>: 550 no",
        f'2026-11-24 12:15:43.145 [9] {IDS[0]} => q@x.test F=<{other}> {AT} {MX} C="250 ok"',
        f'=> q@x.test F=<{other}> {AT} {MX} C="250 ok"',
        "failed to expand headers_add",
    )
    for words in forged:
        record = line(f"{head}SMTP error from remote mail server after RCPT TO:<p@x.test>: 450 {words}", IDS[0])
        evidence = write(tmp_path / "main.log", QUEUED, INTENT, record, DELIVERED)
        assert set(evidence.outcomes) == {TOKEN}, words


def test_the_daemons_start_says_nothing_of_a_message() -> None:
    assert log.parse(line("exim 4.96 daemon started: pid=1, no queue runs, listening for SMTP on [127.0.0.1]:2525")) is None


@pytest.mark.parametrize(
    "rest",
    [
        "unexpected disconnection",
        f"{HOST} rejected MAIL <x@y.test>: no",
    ],
)
def test_a_whole_line_of_an_unknown_form_is_counted_and_hides_nothing(tmp_path: Path, rest: str) -> None:
    evidence = write(tmp_path / "main.log", INTENT, line(rest), DELIVERED)
    assert (evidence.unknown_forms, evidence.bad_lines, evidence.covered) == (1, 0, True)
    with pytest.raises(UnknownForm):
        log.parse(line(rest))


REFUSED = line(f'{HOST} F=<b+{"b" * 48}@bounces.example.test> rejected RCPT <q@y.test>: response to "RCPT TO:<q@y.test>" was: 550 5.1.1 no')


@pytest.mark.parametrize("torn", [INTENT, DELIVERED, REFUSED])
def test_a_line_torn_anywhere_hides_no_other_message(tmp_path: Path, torn: bytes) -> None:
    """What a full disk leaves of one line, with the next line behind it: the second INTENT is never overlooked, and no third message is in doubt."""
    second = line(f"INTENT {'a' * 48} 7", IDS[1])
    for cut in range(1, len(torn) + 1):
        evidence = write(tmp_path / "main.log", torn[:cut] + second)
        assert evidence.covered, cut
        assert "a" * 48 in evidence.intents, cut
        assert evidence.intents.keys() <= {"a" * 48, TOKEN}
        assert evidence.outcomes == {}


@pytest.mark.parametrize("torn", [INTENT, DELIVERED, REFUSED])
def test_a_marker_behind_a_torn_line_is_found(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "main.log"
    for cut in range(1, len(torn) + 1):
        path.write_bytes(torn[:cut] + line("MARK c77.99") + b"\n")
        assert Journal(path, log.parse, log.continues).evidence(Position(path.stat().st_ino, 0), 77).covered, cut


def test_a_marker_among_joined_lines_keeps_its_server() -> None:
    with pytest.raises(Torn) as torn:
        log.parse(DELIVERED[: DELIVERED.index(b'C="') + 8] + line("MARK c77.99 s2"))
    assert torn.value.entries == (Entry(mark="c77.99", server="s2"),)


OTHERS = (
    line("log directory space check failed: space=0 inodes=302", stamp="2026-11-24 12:15:41.001 [99]"),
    line(f'>> q@y.test F=<b+{"b" * 48}@bounces.example.test> R=r T=t H=mx [192.0.2.1] C="250 2.0.0 Ok: kept" QT=0.1s', IDS[0], "2026-11-24 12:15:41.001 [99]"),
    REFUSED,
    line("MARK c1.99", stamp="2026-11-24 12:15:41.001 [99]"),
)


@pytest.mark.parametrize("torn", OTHERS)
def test_a_delivery_behind_a_torn_line_is_never_taken_for_a_deferral(tmp_path: Path, torn: bytes) -> None:
    """With a full log disk: the line of the delivery joins what another process could not end, and the line of the arrival follows whole."""
    for cut in range(1, len(torn) + 1):
        evidence = write(tmp_path / "main.log", INTENT, torn[:cut] + DELIVERED, ARRIVED)
        if TOKEN in evidence.outcomes:
            assert evidence.outcomes[TOKEN].kind is Kind.DELIVERED, cut
        else:
            assert TOKEN in evidence.intents, cut
        # Where nobody else's words can stand in the torn part, nothing is lost by it.
        assert TOKEN in evidence.outcomes or cut < 37 or b'"' in torn[:cut] or b"reject" in torn[:cut], cut


TOKENS = st.text("abcdefghijklmnopqrstuvwxyz234567", min_size=48, max_size=48)
WORDS = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60).map(str.strip)
ENHANCED = st.sampled_from(["", "5.1.1", "2.0.0", "4.7.650"])


def printed(code: int, enhanced: str, lines: list[str]) -> str:
    """An answer as it is on the wire, its lines parted by line feeds."""
    last = len(lines) - 1
    return "\n".join(f"{code}{' ' if number == last else '-'}{enhanced + ' ' if enhanced else ''}{words}" for number, words in enumerate(lines))


def quoted(text: str) -> str:
    """As Exim writes it between quotes."""
    return re.sub(r'(["\\])', r"\\\1", text)


def joined(lines: list[str]) -> str:
    return " ".join(filter(None, lines))


@given(TOKENS, st.integers(200, 599), ENHANCED, st.lists(WORDS, min_size=1, max_size=3), st.sampled_from(IDS))
def test_every_answer_is_read_as_the_destination_gave_it(token: str, code: int, enhanced: str, words: list[str], message_id: str) -> None:
    if any("INTENT " in word for word in words):
        return
    # An answer without an enhanced code may begin with words that look like one: both readings are the same text.
    answer = quoted(printed(code, enhanced, words))
    form = {2: ">> p@x.test F=<{}> R=r T=t H=mx [192.0.2.1] C={}", 4: "H=mx p@x.test F=<{}> tmp-reject from cutthrough after DATA: R=r C={}"}
    rest = form.get(code // 100, "H=mx p@x.test F=<{}> rejected after DATA: R=r C={}").format(f"b+{token}@b.test", f'"{answer}" QT=0.1s')
    entry = log.parse(line(rest, message_id))
    assert entry is not None
    assert entry.outcome is not None
    assert (entry.token, entry.outcome.code) == (token, code)
    assert joined([entry.outcome.enhanced or "", entry.outcome.text]).split() == joined([enhanced, *words]).split()


@given(st.integers(1, 2**63), st.integers(0, 10**10), TOKENS, st.integers(1, 2**22))
def test_our_own_lines_are_read_as_they_were_written(claim: int, expiry: int, token: str, pid: int) -> None:
    assert log.parse(line(f"MARK c{claim}.{expiry}")) == Entry(mark=f"c{claim}.{expiry}")
    assert log.parse(line(f"INTENT {token} {pid}", IDS[0])) == Entry(token, intent_pid=pid)


SAMPLES = [INTENT, DELIVERED, ARRIVED, line("MARK c1.99"), line(f"{HOST} F=<{SENDER}> temporarily rejected RCPT <p@x.test>: {VERIFY}: {REMOTE} x: 451 4.7.1 y")]


@given(
    st.binary(max_size=200)
    | st.tuples(st.sampled_from(SAMPLES), st.integers(0, 300), st.binary(max_size=20)).map(lambda parts: parts[0][: parts[1]] + parts[2])
)
def test_any_bytes_are_an_entry_or_a_counted_error(record: bytes) -> None:
    try:
        entry = log.parse(record)
    except ValueError:
        return
    assert entry is None or isinstance(entry, Entry)


# What may still be said of the first offer of a row, late, when it has been released and offered again under the same token.
OF_THE_FIRST = (
    f"INTENT {TOKEN} 23999 c7.1795522000",
    f"VOID {TOKEN} c7.1795522000",
    f"H=(c7.1795522000) [127.0.0.1] F=<{SENDER}> temporarily rejected RCPT <p@x.test>: no permit",
    f"H=(c7.1795522000) [127.0.0.1] F=<{SENDER}> temporarily rejected RCPT <p@x.test>: {VERIFY}: {REMOTE} RCPT TO:<p@x.test>: 451 4.7.1 later",
    f"H=(c7.1795522000) [127.0.0.1] p@x.test F=<{SENDER}> temporarily rejected after DATA: permit withdrawn",
    f"<= {SENDER} H=(c7.1795522000.google) [127.0.0.1] P=esmtp S=319 Q=google",
    f"== p@x.test {AT} defer (-44) {MX}: {REMOTE} RCPT TO:<p@x.test>: 451 4.7.1 later",
    f"** p@x.test F=<{SENDER}> {AT} {MX}: {REMOTE} RCPT TO:<p@x.test>: 550 5.1.1 unknown",
)


@pytest.mark.parametrize("late", OF_THE_FIRST)
@pytest.mark.parametrize("place", range(4))
def test_what_is_said_late_of_another_claims_offer_ends_nothing(tmp_path: Path, late: str, place: int) -> None:
    """A duplicate would follow if a message that was delivered, or whose body is out, were taken for deferred or never offered."""
    before = line(OF_THE_FIRST[5], IDS[1])
    for ending in ((DELIVERED, ARRIVED), ()):
        own = [INTENT, *ending]
        at = min(place, len(own))
        evidence = write(tmp_path / "main.log", *own[:at], before, line(late, IDS[1]), *own[at:])
        assert evidence.outcomes.get(TOKEN) == (Outcome(Kind.DELIVERED, 250, "2.0.0", "Ok: kept") if ending else None)
        assert (TOKEN in evidence.intents) == (not ending)
        assert evidence.covered


@pytest.mark.parametrize("late", OF_THE_FIRST)
def test_the_same_in_the_queue(tmp_path: Path, late: str) -> None:
    sent = line(f'=> p@x.test F=<{SENDER}> {AT} {MX} C="250 2.0.0 Ok: kept" QT=1s', IDS[0])
    evidence = write(tmp_path / "main.log", QUEUED, INTENT, sent, line(late, IDS[1]))
    assert evidence.outcomes == {TOKEN: Outcome(Kind.DELIVERED, 250, "2.0.0", "Ok: kept")}
    evidence = write(tmp_path / "main.log", QUEUED, INTENT, line(late, IDS[1]))
    assert (evidence.outcomes, list(evidence.intents)) == ({}, [TOKEN])
