"""The public socket: nobody's is stolen, a dead one is cleared, systemd's is taken."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from children import in_child

from convertd_daemon.service import listen
from convertd_daemon.service.preflight import StartError


@pytest.fixture
def path() -> Iterator[Path]:
    """Where to listen, in a directory of root's."""
    with tempfile.TemporaryDirectory(dir="/run") as directory:
        yield Path(directory) / "convertd.sock"


@contextlib.contextmanager
def listening(path: Path, kind: int = socket.SOCK_STREAM) -> Iterator[socket.socket]:
    """Somebody's socket at the path."""
    with socket.socket(socket.AF_UNIX, kind) as theirs:
        theirs.bind(str(path))
        if kind == socket.SOCK_STREAM:
            theirs.listen(1)
        yield theirs


def complaint_of(path: Path) -> str:
    """Why nobody can listen there."""
    with pytest.raises(StartError) as refused:
        listen.listen(str(path))
    return str(refused.value)


class TestListeningSocket:
    """Without systemd."""

    def test_own_socket_allows_every_user_to_connect(self, path: Path) -> None:
        """Who may convert is for the policy to say, by name."""
        listener = listen.listen(str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        assert os.get_blocking(listener.sock.fileno()) is False

        def connect() -> str:
            os.setresuid(1666, 1666, 1666)
            with socket.socket(socket.AF_UNIX) as caller:
                caller.connect(str(path))
            return "connected"

        path.parent.chmod(0o755)
        assert in_child(connect) == "connected"
        listener.close()

    def test_own_socket_mode_is_set_before_listen(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Until listen(2) the kernel refuses whoever comes."""
        seen: list[str] = []

        def watch(name: str) -> Callable[..., object]:
            real = getattr(os if name == "chmod" else socket.socket, name)

            def call(*arguments: object) -> object:
                seen.append(name)
                return real(*arguments)

            return call

        monkeypatch.setattr(os, "chmod", watch("chmod"))
        for name in ("bind", "listen"):
            monkeypatch.setattr(socket.socket, name, watch(name))
        listen.listen(str(path)).close()
        assert seen == ["bind", "chmod", "listen"]

    def test_own_socket_is_removed_when_closed(self, path: Path) -> None:
        """Whoever comes then hears that nothing is there, not that it was refused."""
        listen.listen(str(path)).close()
        assert not path.exists()

    def test_closing_succeeds_when_the_socket_file_is_already_gone(self, path: Path) -> None:
        """An administrator who tidied /run does not keep the daemon from stopping in order."""
        listener = listen.listen(str(path))
        path.unlink()
        listener.close()
        assert listener.sock.fileno() == -1

    def test_stale_socket_is_removed(self, path: Path) -> None:
        """A daemon that was killed leaves its socket."""
        with listening(path):
            pass
        listener = listen.listen(str(path))
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(path))
        listener.close()

    def test_socket_of_a_running_daemon_is_not_replaced(self, path: Path) -> None:
        """Another daemon serves there, and goes on serving."""
        with listening(path) as theirs:
            assert complaint_of(path) == f"{path}: another daemon listens there"
            theirs.accept()[0].close()
            with socket.socket(socket.AF_UNIX) as caller:
                caller.connect(str(path))
                theirs.accept()[0].close()

    def test_socket_of_a_running_daemon_with_a_full_backlog_is_not_replaced(
        self, path: Path
    ) -> None:
        """It answers EAGAIN, which is not the answer of the dead."""
        with listening(path), contextlib.ExitStack() as waiting:
            while True:
                caller = waiting.enter_context(
                    socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                )
                if caller.connect_ex(str(path)) != 0:
                    break
            assert complaint_of(path) == f"{path}: another daemon listens there"

    def test_socket_of_another_type_in_use_is_not_replaced(self, path: Path) -> None:
        """A datagram socket is somebody's, too."""
        with listening(path, socket.SOCK_DGRAM):
            assert complaint_of(path) == f"{path}: another daemon listens there"

    @pytest.mark.parametrize(
        "make",
        [
            pytest.param(lambda path: path.touch(), id="a-file"),
            pytest.param(lambda path: path.mkdir(), id="a-directory"),
            pytest.param(lambda path: path.symlink_to("/run/elsewhere"), id="a-link"),
        ],
    )
    def test_file_that_is_not_a_socket_is_not_removed(
        self, path: Path, make: Callable[[Path], None]
    ) -> None:
        """Somebody put it there for a reason."""
        make(path)
        assert complaint_of(path) == f"{path}: exists, and is no socket"
        assert os.path.lexists(path)

    @pytest.mark.parametrize(
        ("mode", "owner"), [(0o777, 0), (0o775, 0), (0o755, 1234)], ids=["all", "group", "another"]
    )
    def test_socket_directory_writable_by_others_is_refused(
        self, path: Path, mode: int, owner: int
    ) -> None:
        """They would be asked in our place."""
        path.parent.chmod(mode)
        os.chown(path.parent, owner, 0)
        assert "others than root may put a socket there" in complaint_of(path)

    def test_socket_directory_whose_parent_is_writable_by_others_is_refused(
        self, path: Path
    ) -> None:
        """Root would make and remove things wherever they put another in its place."""
        inner = path.parent / "inner"
        inner.mkdir()
        os.chown(path.parent, 1234, 0)
        assert f"{path.parent} can be changed by uid 1234" in complaint_of(inner / path.name)

    def test_symlink_of_root_in_the_socket_path_is_resolved_once(self, path: Path) -> None:
        """As /var/run leads to /run; what comes beside the socket is put there too."""
        inner, link = path.parent / "inner", path.parent / "link"
        inner.mkdir()
        link.symlink_to(inner)
        listener = listen.listen(str(link / path.name))
        assert listener.own_path == str(inner / path.name)
        listener.close()

    def test_sticky_socket_directory_of_root_is_accepted(self, path: Path) -> None:
        """Nobody can remove there what is root's."""
        path.parent.chmod(0o1777)
        listen.listen(str(path)).close()

    def test_socket_path_that_is_too_long_is_reported(self, path: Path) -> None:
        """sun_path has 108 bytes."""
        complaint = complaint_of(path.parent / ("x" * 120))
        assert "can't listen at" in complaint

    def test_socket_directory_that_is_missing_is_reported(self, path: Path) -> None:
        """Not a traceback."""
        missing = path.parent / "missing" / "convertd.sock"
        with pytest.raises((StartError, FileNotFoundError), match="missing"):
            listen.listen(str(missing))


def passed(*sockets: socket.socket, **changes: str) -> tuple[str, str]:
    """What becomes of sockets that systemd passed: a path or a complaint.

    And what is left in the environment of the news of them. In a child, for it takes descriptor 3.
    """

    def act() -> tuple[str, str]:
        for number, sock in enumerate(sockets):
            os.dup2(sock.fileno(), listen.FIRST_PASSED + number)
        told = {
            "LISTEN_PID": str(os.getpid()),
            "LISTEN_FDS": str(len(sockets)),
            "LISTEN_FDNAMES": "convertd.socket",
            **changes,
        }
        os.environ.update(told)
        try:
            listener = listen.listen("/run/never-made/convertd.sock")
        except (StartError, FileNotFoundError) as error:
            outcome = str(error)
        else:
            assert not os.get_inheritable(listener.sock.fileno())
            assert not os.get_blocking(listener.sock.fileno())
            outcome = f"listens at {listener.sock.getsockname()}"
            listener.close()
        return outcome, ",".join(name for name in os.environ if name.startswith("LISTEN_"))

    return in_child(act)


class TestSystemdSocket:
    """Socket activation. Source: sd_listen_fds(3)."""

    def test_systemd_socket_is_used(self, path: Path) -> None:
        """It does not block, and neither it nor the news of it reaches a child."""
        with listening(path) as theirs:
            assert passed(theirs) == (f"listens at {path}", "")

    def test_systemd_socket_is_kept_when_the_daemon_stops(self, path: Path) -> None:
        """Systemd made it, and starts the daemon anew for who comes."""
        with listening(path) as theirs:
            passed(theirs)
            with socket.socket(socket.AF_UNIX) as caller:
                caller.connect(str(path))

    @pytest.mark.parametrize(
        "changes",
        [
            pytest.param({"LISTEN_PID": "1"}, id="another-process"),
            pytest.param({"LISTEN_PID": ""}, id="nobody"),
            pytest.param({"LISTEN_FDS": ""}, id="no-number"),
            pytest.param({"LISTEN_FDS": "0"}, id="none"),
            pytest.param({"LISTEN_FDS": "x"}, id="what-is-no-number"),
        ],
    )
    def test_systemd_socket_is_not_used_if_meant_for(
        self, path: Path, changes: dict[str, str]
    ) -> None:
        """Then the daemon makes its own."""
        with listening(path) as theirs:
            outcome, left = passed(theirs, **changes)
        assert "never-made" in outcome
        assert left == ""

    def test_systemd_socket_must_be_the_only_one(self, path: Path) -> None:
        """Nothing says which of two would be ours."""
        with listening(path) as one, listening(path.with_suffix(".2")) as two:
            assert passed(one, two)[0] == "systemd passed 2 sockets, not one"

    def test_systemd_socket_must_be_a_listening_unix_stream(self, path: Path) -> None:
        """Credentials come by no other."""
        with listening(path, socket.SOCK_DGRAM) as datagram:
            assert "not a listening AF_UNIX stream" in passed(datagram)[0]
        with socket.socket(socket.AF_UNIX) as alone:
            assert "not a listening AF_UNIX stream" in passed(alone)[0]
        with socket.socket() as internet:
            internet.bind(("127.0.0.1", 0))
            internet.listen()
            assert "not a listening AF_UNIX stream" in passed(internet)[0]

    def test_systemd_descriptor_must_be_a_socket(self, path: Path) -> None:
        """What is none is named as such, in one line."""

        def act() -> str:
            os.dup2(os.open("/dev/null", os.O_RDONLY), listen.FIRST_PASSED)
            os.environ.update({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"})
            return complaint_of(path)

        assert "not a listening AF_UNIX stream" in in_child(act)
