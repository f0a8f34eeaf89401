"""What holds for the tests of every package."""

import signal


def pytest_configure() -> None:
    """Hear Ctrl-C even where a shell started the tests in the background, which ignores it for all children too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
