"""What is read of a journal piece by piece is what is read of it at once."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mail_pipelines.dispatch.catcher import log as catcher_log
from mail_pipelines.dispatch.exim import log as exim_log
from mail_pipelines.dispatch.follower import Follower, Watch
from mail_pipelines.dispatch.journal import Journal, Kind, Outcome, Position

STAMP = "2026-11-24 12:15:42.927 [23506]"
TOKENS = [letter * 48 for letter in "abcd"]
CLAIMS = (7, 77)


def exim_lines(token: str) -> list[str]:
    return [
        f"{STAMP} 1vNq5r-000AbC-01 INTENT {token} 23506",
        f'{STAMP} 1vNq5r-000AbC-01 >> p@x.test F=<b+{token}@b.test> R=r T=t H=mx [192.0.2.1] C="250 ok"',
        f"{STAMP} 1vNq5r-000AbC-01 <= b+{token}@b.test H=x P=esmtp S=319",
        f'{STAMP} 1vNq5r-000AbC-01 H=x p@x.test F=<b+{token}@b.test> rejected after DATA: R=r C="550-5.7.1 first\n550 5.7.1 second"',
        f"{STAMP} H=x F=<b+{token}@b.test> temporarily rejected RCPT <p@x.test>: no permit",
    ]


LINES = st.one_of(
    st.sampled_from([f"{STAMP} MARK c{claim}.99" for claim in (*CLAIMS, 8)]),
    st.sampled_from([line for token in TOKENS for line in exim_lines(token)]),
    st.sampled_from(
        [f"{exim_lines(token)[1][:-2]}{STAMP} {last}" for token in TOKENS[1:3] for last in ("MARK c77.99", f"1vNq5r-000AbC-01 INTENT {TOKENS[0]} 23506")]
    ),
    st.sampled_from(["torn INTENT", f"{STAMP} x INTENT {TOKENS[0]} 1", f"{STAMP} a form that nobody knows", f"{STAMP} 1vNq5r-000AbC-01 Completed"]),
)
STEPS = st.lists(st.one_of(LINES, LINES, st.just("look"), st.just("rotate"), st.just("claim")), max_size=40)


def rotate(path: Path) -> None:
    for older in sorted(path.parent.glob("main.log.*"), key=lambda found: int(found.suffix[1:]), reverse=True):
        older.rename(path.with_name(f"main.log.{int(older.suffix[1:]) + 1}"))
    path.rename(path.with_name("main.log.1"))
    path.touch()


@given(STEPS)
def test_reading_on_says_what_reading_from_the_beginning_says(steps: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="mail-pipelines-") as folder:
        path = Path(folder) / "main.log"
        path.touch()
        journal = Journal(path, exim_log.parse, exim_log.continues)
        follower = Follower(journal)
        waiting = list(CLAIMS)
        open_claims: list[tuple[Watch, Position, int, list[str]]] = []
        for step in ["claim", *steps, "look"]:
            if step == "claim":
                if waiting:
                    claim = waiting.pop(0)
                    watch = follower.watch(claim)
                    tokens = TOKENS[:2] if claim == CLAIMS[0] else TOKENS[2:]
                    follower.expect(watch, tokens)
                    open_claims.append((watch, journal.end(), claim, tokens))
            elif step == "rotate":
                rotate(path)
            elif step == "look":
                for watch, position, claim, tokens in open_claims:
                    at_once, followed = journal.evidence(position, claim), follower.evidence(watch)
                    assert followed.covered == at_once.covered
                    assert followed.intents == {token: pid for token, pid in at_once.intents.items() if token in tokens}
                    assert followed.outcomes == {token: outcome for token, outcome in at_once.outcomes.items() if token in tokens}
            else:
                with path.open("a") as file:
                    file.write(step + "\n")


def catcher_journal(folder: Path) -> tuple[Path, Follower, Watch]:
    """A journal with a claim whose marker is written, and one message delivered."""
    path = folder / "main.log"
    path.touch()
    follower = Follower(Journal(path, catcher_log.parse))
    watch = follower.watch(7)
    follower.expect(watch, ["aa", "bb"])
    lines = [catcher_log.mark("c7.99"), catcher_log.intent("aa", 5), catcher_log.done("aa", Outcome(Kind.DELIVERED, 250))]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    assert follower.evidence(watch).covered
    return path, follower, watch


def test_a_line_counts_when_it_is_whole(tmp_path: Path) -> None:
    path, follower, watch = catcher_journal(tmp_path)
    line = catcher_log.intent("bb", 6)
    with path.open("ab") as file:
        for part in (line[:-4], line[-4:], b"\n"):
            assert "bb" not in follower.evidence(watch).intents
            file.write(part)
            file.flush()
    assert follower.evidence(watch).intents == {"bb": 6}


@pytest.mark.parametrize("loss", ["truncated", "gone"])
def test_a_gap_ends_the_coverage_for_good(tmp_path: Path, loss: str) -> None:
    """From then on no silence of the journal proves anything for this claim."""
    path, follower, watch = catcher_journal(tmp_path)
    if loss == "gone":
        path.unlink()
        path.touch()
    else:
        path.write_bytes(b"")
    assert not follower.evidence(watch).covered
    with path.open("ab") as file:
        file.write(catcher_log.mark("c7.99") + b"\n")
    found = follower.evidence(watch)
    assert not found.covered
    # What was read before still holds.
    assert found.outcomes["aa"].kind is Kind.DELIVERED


def test_a_claim_begun_after_the_gap_is_covered(tmp_path: Path) -> None:
    path, follower, watch = catcher_journal(tmp_path)
    path.write_bytes(b"")
    assert not follower.evidence(watch).covered
    later = follower.watch(8)
    with path.open("ab") as file:
        file.write(catcher_log.mark("c8.99") + b"\n")
    assert follower.evidence(later).covered
    follower.forget(watch)
    assert follower.evidence(later).covered


def test_a_row_that_is_claimed_again_before_its_first_claim_is_forgotten_is_still_followed(tmp_path: Path) -> None:
    """The release is committed, the next claim has the row, and only then the first claim ends."""
    path = tmp_path / "main.log"
    path.touch()
    follower = Follower(Journal(path, exim_log.parse, exim_log.continues))
    first, second = follower.watch(CLAIMS[0]), follower.watch(CLAIMS[1])
    follower.expect(first, [TOKENS[0]])
    follower.expect(second, [TOKENS[0]])
    follower.forget(first)
    path.write_text("".join(f"{line}\n" for line in exim_lines(TOKENS[0])[:2]))
    assert follower.evidence(second).outcomes[TOKENS[0]].kind is Kind.DELIVERED
    follower.forget(second)
