import pytest

from kvmd.log_buffer import LogBuffer


def test_lines_come_out_as_they_went_in() -> None:
    buffer = LogBuffer(is_terminal=True)
    assert buffer.write("one\n") == 4
    buffer.write("zwei ä\n")
    buffer.flush()
    assert buffer.isatty()
    assert buffer.writable()
    assert buffer.take() == "one\nzwei ä\n".encode()
    assert buffer.take() == b""


def test_lines_beyond_the_bound_are_dropped_and_counted() -> None:
    buffer = LogBuffer(is_terminal=False, capacity=8)
    for line in ("123456\n", "dropped\n", "1\n2\n"):
        buffer.write(line)
    assert buffer.take() == b'123456\n{"event": "log-lines-lost", "lost": 3}\n'
    buffer.write("again\n")
    assert buffer.take() == b"again\n"


def test_text_that_is_no_unicode_is_written_all_the_same() -> None:
    buffer = LogBuffer(is_terminal=False)
    buffer.write("a\udcffb\n")
    assert buffer.take() == b"a\\udcffb\n"


def test_wake_is_called_when_there_is_something_again() -> None:
    buffer = LogBuffer(is_terminal=False)
    buffer.write("early\n")
    woken: list[str] = []
    buffer.set_wake(lambda: woken.append("wake"))
    assert woken == ["wake"]
    buffer.write("more\n")
    assert woken == ["wake"]
    buffer.take()
    buffer.write("again\n")
    assert woken == ["wake", "wake"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_it_says_what_it_was_told_of_the_terminal(*, is_terminal: bool) -> None:
    assert LogBuffer(is_terminal=is_terminal).isatty() is is_terminal
