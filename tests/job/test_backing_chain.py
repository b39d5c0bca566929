"""An image and all it stands on: each member read as if the caller had asked for its path."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import descriptors
import encrypting
import grants
import pytest
import whole_job
from children import in_child

from convertd_core import conditions, messages, results, values
from convertd_daemon import channel
from convertd_daemon.job import context, local_grant, stages
from convertd_daemon.job.files import opened_source, paths
from convertd_daemon.job.qemu import backing_chain, execution

MIB = 1024 * 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What became of looking for a chain."""

    members: tuple[tuple[str, str], ...] = ()
    failure: conditions.Failure | None = None

    @property
    def names(self) -> list[str]:
        """The last names of the members."""
        return [os.path.basename(path) for path, _ in self.members]

    @property
    def problem(self) -> str:
        """What is said against the member that was refused."""
        assert self.failure is not None
        assert self.failure.reason == "BACKING_REFUSED", self.failure
        return dict(self.failure.values)["problem"]


@contextlib.contextmanager
def runner() -> Iterator[execution.Runner]:
    """What runs qemu-img in its sandbox."""
    ours, theirs = channel.Channel.pair()
    setup = whole_job.setup()
    with ours, theirs, execution.opened(setup) as worker:
        yield execution.Runner(worker, context.JobContext(ours, 60.0))


def followed(rules: grants.Rules, path: Path, stated: str = "qcow2") -> Found:
    """Follow the chain of an image to its base, and see that every descriptor is closed."""
    grant = rules.convert(grants.request(path, path.with_name("never-written"), stated))
    return in_child(lambda: follow(grant))


def follow(grant: values.ConvertGrant) -> Found:
    """As above, in a child that may start programs."""
    before = descriptors.open_descriptors()
    try:
        with runner() as run, contextlib.ExitStack() as stack:
            top = stack.enter_context(paths.open_source(grant.source, grant.peer))
            links = backing_chain.follow(grant, top, run, stack)
            members = tuple((link.member.path, link.member.info.format) for link in links)
            assert all(os.fstat(link.source.fd) for link in links)
    except conditions.ConvertError as error:
        assert descriptors.open_descriptors() - before == set()
        return Found(failure=error.failure())
    assert descriptors.open_descriptors() - before == set()
    return Found(members=members)


def image(path: Path, image_format: str = "raw") -> Path:
    """An image that stands alone."""
    argv = ["qemu-img", "create", "-q", "-f", image_format, str(path), "1M"]
    subprocess.run(argv, check=True)
    path.chmod(0o600)
    return path


def overlay(path: Path, backing: object, backing_format: str = "raw") -> Path:
    """A qcow2 that says that it stands on that, whether or not it is there."""
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", str(backing)]
    subprocess.run([*argv, "-F", backing_format, str(path), "1M"], check=True)
    path.chmod(0o600)
    return path


def without_format(path: Path) -> Path:
    """The same overlay, its header extension with the backing format turned into an unknown one."""
    data = path.read_bytes()
    where = data.index(struct.pack(">I", 0xE2792ACA))
    path.write_bytes(data[:where] + struct.pack(">I", 0x0BADCAFE) + data[where + 4 :])
    return path


@pytest.fixture
def images(area: Path) -> Path:
    """A root of files."""
    root = area / "images"
    (root / "bases").mkdir(parents=True)
    return root


@pytest.fixture
def rules(images: Path) -> grants.Rules:
    """Who may read in that root alone."""
    return grants.Rules(roots=(grants.files(images),))


class TestChainDiscovery:
    """What is found."""

    def test_image_without_a_backing_file_is_a_chain_of_one(
        self, rules: grants.Rules, images: Path
    ) -> None:
        """Of one."""
        assert followed(rules, image(images / "a", "qcow2")).names == ["a"]

    def test_chain_is_resolved_down_to_its_base(self, rules: grants.Rules, images: Path) -> None:
        """Relative to the overlay, absolute, up and down again."""
        image(images / "base")
        overlay(images / "bases" / "c", "../base")
        overlay(images / "b", images / "bases" / "c", "qcow2")
        overlay(images / "a", "bases/../b", "qcow2")
        found = followed(rules, images / "a")
        assert found.members == (
            (f"{images}/a", "qcow2"),
            (f"{images}/b", "qcow2"),
            (f"{images}/bases/c", "qcow2"),
            (f"{images}/base", "raw"),
        )

    def test_chain_members_may_have_any_format_the_rule_allows(
        self, rules: grants.Rules, images: Path
    ) -> None:
        """And of no other."""
        image(images / "base", "vdi")
        overlay(images / "a", "base", "vdi")
        assert followed(rules, images / "a").names == ["a", "base"]
        few = dataclasses.replace(rules, read_formats=("raw", "qcow2"))
        failure = followed(few, images / "a").failure
        assert failure is not None
        assert failure.reason == "FORMAT_NOT_ALLOWED"

    def test_daemon_access_reads_chain_members_of_other_owners(
        self, rules: grants.Rules, images: Path
    ) -> None:
        """Mixed owners and directories; qemu-img reads each."""
        os.chown(image(images / "base"), 1666, 1666)
        os.chown(overlay(images / "b", "base"), 1300, 1300)
        os.chown(overlay(images / "a", "b", "qcow2"), 1234, 1234)
        (images / "bases").chmod(0o700)
        assert followed(rules, images / "a").names == ["a", "b", "base"]

    def test_caller_access_reads_chain_members_with_the_rights_of_the_caller(
        self, images: Path
    ) -> None:
        """One that it could not read itself is refused."""
        rules = grants.Rules(roots=(grants.files(images, access=values.RootAccess.CALLER),))
        os.chown(overlay(images / "a", "base"), 1234, 1234)
        os.chown(image(images / "base"), 1234, 1234)
        assert followed(rules, images / "a").names == ["a", "base"]
        os.chown(images / "base", 1666, 1666)
        assert "uid 1234" in followed(rules, images / "a").problem

    def test_base_in_another_root_is_read_with_the_settings_of_that_root(self, area: Path) -> None:
        """Its own rights, its own kind."""
        for name in ("images", "library"):
            (area / name).mkdir()
        library = grants.files(area / "library", name="library", access=values.RootAccess.CALLER)
        rules = grants.Rules(roots=(grants.files(area / "images"), library))
        os.chown(image(area / "library" / "base"), 1234, 1234)
        overlay(area / "images" / "a", "../library/base")
        assert followed(rules, area / "images" / "a").names == ["a", "base"]

    def test_local_grant_allows_a_base_anywhere_and_follows_symlinks(
        self, images: Path, area: Path
    ) -> None:
        """And links on the way are followed."""
        image(area / "base")
        overlay(images / "a", area / "link")
        (area / "link").symlink_to("base")
        request = grants.request(images / "a", images / "b", "qcow2")
        grant = local_grant.grant(messages.LocalRequest(qemu_img="", request=request))
        assert isinstance(grant, values.ConvertGrant)
        assert in_child(lambda: follow(grant)).names == ["a", "link"]


class TestRefusals:
    """What an image can't have read through it."""

    @pytest.mark.parametrize(
        "name",
        [
            'json:{"driver":"file","filename":"/etc/shadow"}',
            "nbd:localhost:10809",
            "file:/etc/shadow",
            "fat:/etc",
            "a:b/c",
            ":",
        ],
    )
    def test_backing_file_name_with_a_protocol_prefix_is_refused(
        self, rules: grants.Rules, images: Path, name: str
    ) -> None:
        """As qemu tells one: a colon before the first slash."""
        assert followed(rules, overlay(images / "a", name)).problem == (
            "it is not the plain name of a file"
        )

    def test_backing_file_name_with_a_colon_after_a_slash_is_a_path(
        self, rules: grants.Rules, images: Path
    ) -> None:
        """As in a path of libvirt's."""
        image(images / "bases" / "nbd:1")
        assert followed(rules, overlay(images / "a", "bases/nbd:1")).names == ["a", "nbd:1"]

    @pytest.mark.parametrize(
        "name",
        [
            "/etc/passwd",
            "/etc/no-such-file",
            "../outside",
            "../no-such-file",
            "../../../../../../etc/passwd",
            "//etc/passwd",
            "/proc/self/fd/3",
            "/dev/sda",
        ],
    )
    def test_backing_file_outside_the_roots_gets_the_same_refusal_whether_it_exists(
        self, rules: grants.Rules, images: Path, area: Path, name: str
    ) -> None:
        """Whether it exists or not has one answer."""
        image(area / "outside")
        found = followed(rules, overlay(images / "a", name))
        assert found.problem == "it is not below a root that you may read"

    def test_backing_file_that_is_a_root_directory_is_refused(
        self, rules: grants.Rules, images: Path
    ) -> None:
        """Nor is a directory in it."""
        assert "not below a root" in followed(rules, overlay(images / "a", images)).problem
        assert "a directory" in followed(rules, overlay(images / "b", "bases")).problem

    def test_backing_file_in_a_nested_root_the_rule_does_not_name_is_refused(
        self, images: Path
    ) -> None:
        """The longest root decides, as for a path of the caller's."""
        image(images / "bases" / "base")
        hidden = grants.files(images / "bases", name="hidden")
        rules = grants.Rules(roots=(grants.files(images),), hidden=(hidden,))
        found = followed(rules, overlay(images / "a", "bases/base"))
        assert found.problem == "it is not below a root that you may read"

    def test_missing_backing_file_inside_the_roots_is_reported_as_missing(
        self, rules: grants.Rules, images: Path
    ) -> None:
        """The caller may look there."""
        problem = followed(rules, overlay(images / "a", "absent")).problem
        assert problem == f"{images}/absent: no such file"

    def test_symlink_is_not_followed(self, rules: grants.Rules, images: Path) -> None:
        """Wherever it leads."""
        image(images / "base")
        (images / "link").symlink_to("base")
        assert "symbolic link" in followed(rules, overlay(images / "a", "link")).problem

    def test_backing_file_that_is_not_a_regular_file_is_refused_unopened(
        self, rules: grants.Rules, images: Path
    ) -> None:
        """A FIFO would block for ever."""
        os.mkfifo(images / "fifo")
        assert "a FIFO" in followed(rules, overlay(images / "a", "fifo")).problem

    @pytest.mark.parametrize("name", ["x" * 256, "a/" * 500 + "b"], ids=["a-name", "a-path"])
    def test_backing_file_name_that_is_too_long_is_refused(
        self, rules: grants.Rules, images: Path, name: str
    ) -> None:
        """And shown as far as it fits."""
        failure = followed(rules, overlay(images / "a", name)).failure
        assert failure is not None
        assert failure.reason == "BACKING_REFUSED"
        assert len(dict(failure.values)["backing"]) <= 257

    def test_backing_file_name_with_invalid_utf8_is_refused(
        self, rules: grants.Rules, images: Path
    ) -> None:
        """A qcow2 may have any bytes there."""
        path = overlay(images / "a", "some-name-of-bytes")
        path.write_bytes(path.read_bytes().replace(b"some-name-of-bytes", b"\xff" * 18))
        failure = followed(rules, path).failure
        assert failure is not None
        assert failure.status is conditions.Status.FAILED_PRECONDITION

    @pytest.mark.parametrize("length", [1, 2, 3])
    def test_chain_with_a_loop_is_refused(
        self, rules: grants.Rules, images: Path, length: int
    ) -> None:
        """By the inode, at the first member that comes again."""
        for number in range(length):
            overlay(images / str(number), str((number + 1) % length), "qcow2")
        assert followed(rules, images / "0").problem == "the chain is a loop"

    def test_chain_with_a_loop_through_a_hard_link_is_refused(
        self, rules: grants.Rules, images: Path
    ) -> None:
        """A hard link."""
        overlay(images / "a", "b", "qcow2")
        os.link(images / "a", images / "b")
        assert followed(rules, images / "a").problem == "the chain is a loop"

    def test_chain_over_the_depth_limit_is_refused(
        self, rules: grants.Rules, images: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each member takes a descriptor, and a run of qemu-img."""
        monkeypatch.setattr(backing_chain, "MAX_MEMBERS", 3)
        image(images / "0")
        for number in (1, 2, 3):
            overlay(images / str(number), str(number - 1), "qcow2" if number > 1 else "raw")
        assert followed(rules, images / "2").names == ["2", "1", "0"]
        assert followed(rules, images / "3").problem == "the chain has more than 3 members"

    def test_backing_file_of_another_format_than_the_overlay_states_is_refused(
        self, rules: grants.Rules, images: Path
    ) -> None:
        """And one that is said to be raw is read as raw, whatever is in it."""
        image(images / "base", "vdi")
        failure = followed(rules, overlay(images / "a", "base", "qcow2")).failure
        assert failure is not None
        assert failure.reason == "FORMAT_MISMATCH"
        found = followed(rules, overlay(images / "b", "base", "raw"))
        assert found.members[1] == (f"{images}/base", "raw")

    def test_encrypted_backing_file_is_refused(self, rules: grants.Rules, images: Path) -> None:
        """There is one passphrase, and it is for the source itself."""
        options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
        secret = ["--object", "secret,id=s,data=x", "-o", options]
        encrypting.qemu_img("create", "-q", "-f", "qcow2", *secret, images / "base", "1M")
        found = followed(rules, overlay(images / "a", "base", "qcow2"))
        assert found.problem == "it is encrypted, and only the source itself may be"

    def test_backing_file_with_an_external_data_file_is_refused(
        self, rules: grants.Rules, images: Path
    ) -> None:
        """As it would be by itself."""
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={images}/data"]
        subprocess.run([*argv, str(images / "base"), "1M"], check=True)
        failure = followed(rules, overlay(images / "a", "base", "qcow2")).failure
        assert failure is not None
        assert failure.reason == "IMAGE_REFUSED"


class TestOverlayWithoutABackingFormat:
    """An overlay that doesn't say what it stands on."""

    def test_overlay_without_a_backing_format_on_a_raw_base_is_accepted(
        self, rules: grants.Rules, images: Path
    ) -> None:
        """That is what no header in it means."""
        image(images / "base")
        path = without_format(overlay(images / "a", "base"))
        assert followed(rules, path).members[1] == (f"{images}/base", "raw")
        few = dataclasses.replace(rules, read_formats=("qcow2",))
        failure = followed(few, path).failure
        assert failure is not None
        assert failure.reason == "FORMAT_NOT_ALLOWED"

    def test_overlay_without_a_backing_format_on_another_base_is_refused(
        self, rules: grants.Rules, images: Path
    ) -> None:
        """A guest can write a header into a raw disk, so a probe settles nothing."""
        image(images / "base", "qcow2")
        problem = followed(rules, without_format(overlay(images / "a", "base"))).problem
        assert problem.endswith(f"qemu-img rebase -u -f qcow2 -b base -F qcow2 {images}/a")


class TestInspectedChains:
    """To look at an image shows as much of its chain as the caller may read."""

    def inspected(self, rules: grants.Rules, path: Path) -> results.ImageInfo:
        """What a whole job says."""
        source = values.Source(path=str(path), format="qcow2")
        return whole_job.run(rules.inspect(source)).inspected

    def test_inspect_shows_the_chain_to_its_base(self, rules: grants.Rules, images: Path) -> None:
        """And said to be all of it."""
        image(images / "base")
        said = self.inspected(rules, overlay(images / "a", "base"))
        assert said.path == f"{images}/a"
        assert [member.path for member in said.backing_chain] == [f"{images}/base"]
        assert said.backing_chain_complete

    @pytest.mark.parametrize("name", ["absent", "/etc/passwd", "json:{}", "a"])
    def test_inspect_marks_an_incomplete_chain(
        self, rules: grants.Rules, images: Path, name: str
    ) -> None:
        """What the header says is shown; it is in the image, which the caller may read."""
        said = self.inspected(rules, overlay(images / "a", name, "qcow2"))
        assert said.backing_chain == ()
        assert said.backing_filename == name
        assert not said.backing_chain_complete

    def test_inspect_shows_the_path_of_the_caller_and_not_of_qemu_img(
        self, rules: grants.Rules, images: Path
    ) -> None:
        """The caller's own path is."""
        said = self.inspected(rules, image(images / "a", "qcow2"))
        assert "/proc/self/fd" not in said.qemu_img_json
        assert f'"filename": "{images}/a"' in said.qemu_img_json

    def test_inspect_does_not_show_an_image_of_a_format_not_allowed(
        self, rules: grants.Rules, images: Path
    ) -> None:
        """Found out or stated."""
        few = dataclasses.replace(rules, read_formats=("raw",))
        source = values.Source(path=str(image(images / "a", "qcow2")))
        assert whole_job.run(few.inspect(source)).reason == "FORMAT_NOT_ALLOWED"


class TestPassphrases:
    """What was said of one is held against what the source is."""

    @pytest.mark.parametrize(
        ("is_encrypted", "has_one", "expected"),
        [
            (True, True, None),
            (False, False, None),
            (True, False, conditions.SecretMissing),
            (False, True, conditions.BadOption),
        ],
    )
    def test_passphrase_is_accepted_for_an_encrypted_image_only(
        self,
        is_encrypted: bool,  # noqa: FBT001
        has_one: bool,  # noqa: FBT001
        expected: type[conditions.ConvertError] | None,
    ) -> None:
        """Neither is a passphrase dropped, nor an image read without one."""
        info = stages.ProbedImage(
            format="qcow2", virtual_size_bytes=1, actual_size_bytes=1, encrypted=is_encrypted
        )
        place = grants.Rules(roots=(grants.files("/images"),)).place("/images/a")
        source = opened_source.Source(place=place, fd=-1, size_bytes=1, allocated_bytes=1)
        encryption = values.SourceEncryption() if has_one else None
        asked = values.Source(path="/images/a", encryption=encryption)
        link = backing_chain.ChainLink(source=source, info=info)
        if expected is None:
            backing_chain.check_encryption(asked, link)
        else:
            with pytest.raises(expected):
                backing_chain.check_encryption(asked, link)
