"""The plan: what will be run, decided from what was granted and found, and from nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import Any

import grants
import pytest
import refusals
from hypothesis import given
from hypothesis import strategies as st

from convertd_core import conditions, creation_options, results, values
from convertd_daemon.job import stages
from convertd_daemon.job.qemu import plan

MIB = 1024 * 1024
GIB = 1024 * MIB

FILES = grants.files("/images")
DEVICES = grants.devices("/dev/vg", allow_is_zero=True)
RULES = grants.Rules(
    roots=(FILES, DEVICES),
    limits=grants.limits(virtual_size_bytes=2 * GIB),
)

MODES = (
    values.CacheMode.AUTO,
    values.CacheMode.NONE,
    values.CacheMode.WRITEBACK,
    values.CacheMode.WRITETHROUGH,
    values.CacheMode.DIRECTSYNC,
)

INFO = stages.ProbedImage(format="qcow2", virtual_size_bytes=GIB, actual_size_bytes=100 * MIB)


REQUEST = grants.request("/images/in.qcow2", "/images/out", "qcow2")
ONTO_DEVICE = grants.request("/images/in.qcow2", "/dev/vg/out", "qcow2")


def to(image_format: str = "raw", **changes: object) -> values.ConvertGrant:
    """Leave to convert /images/in.qcow2 to /images/out, in this format and so."""
    return RULES.convert(grants.to(REQUEST, format=image_format, **changes))


def asked(**changes: object) -> values.ConvertGrant:
    """Leave to convert /images/in.qcow2 to the raw image /images/out, so."""
    return RULES.convert(dataclasses.replace(REQUEST, **changes))  # type: ignore[arg-type]


ENCRYPTED = values.Source(
    path="/images/in.luks", format="luks", encryption=values.SourceEncryption()
)


def member(info: stages.ProbedImage = INFO, path: str = "/images/in.qcow2") -> stages.ChainMember:
    """One image of the source's chain."""
    return stages.ChainMember(path=path, info=info)


FACTS = plan.Facts(
    chain=(plan.Node(format="qcow2", fd=7),),
    dest=plan.Node(format="raw", fd=8),
    source_direct=None,
    dest_direct=None,
    available_bytes=5 * GIB,
)
ON_DEVICE = dataclasses.replace(FACTS, dest=plan.Node(format="raw", fd=8, on_device=True))


def made(
    a_grant: values.ConvertGrant | None = None,
    facts: plan.Facts = FACTS,
    chain: tuple[stages.ChainMember, ...] = (member(),),
) -> stages.ConversionPlan:
    """The plan for a grant."""
    return plan.make(a_grant or RULES.convert(REQUEST), chain, facts)


def after(argv: tuple[str, ...], name: str) -> str:
    """The argument that follows another one."""
    return argv[argv.index(name) + 1]


def graph_of(*chain: plan.Node, encrypted: bool = False) -> dict[str, Any]:
    """The graph that these images make."""
    return parsed(plan.graph(chain, encrypted=encrypted))


def parsed(argument: str) -> dict[str, Any]:
    """What a graph in a command says."""
    graph: dict[str, Any] = json.loads(argument.removeprefix("json:"))
    return graph


FILE_7 = '"driver":"file","filename":"/proc/self/fd/7"'


class TestCommand:
    """The arguments of qemu-img convert."""

    def test_command_of_a_plain_conversion_is_complete(self) -> None:
        """All of it: descriptors only, one complete graph, every cache mode stated."""
        assert made().argv == (
            *("qemu-img", "convert", "-p", "-t", "none", "-T", "none", "-W"),
            *("-O", "raw"),
            f'json:{{"driver":"qcow2","file":{{{FILE_7}}},"backing":null}}',
            "/proc/self/fd/8",
        )

    def test_displayed_command_has_the_paths_of_the_caller_and_no_secrets(self) -> None:
        """And neither descriptors nor secrets."""
        encrypted = to("qcow2", encryption=values.DestinationEncryption())
        command = made(encrypted).command
        assert command[:4] == ("qemu-img", "convert", "--object", "secret,id=dest,file=PASSPHRASE")
        assert command[-4:] == ("-f", "qcow2", "/images/in.qcow2", "/images/out")

    def test_displayed_command_reads_the_full_vhd(self) -> None:
        """A format alone would have the last sectors cut off; and a comma is in the path."""
        info = dataclasses.replace(INFO, format="vpc")
        request = dataclasses.replace(
            REQUEST, source=values.Source(path="/images/a,b", format="vpc")
        )
        command = made(RULES.convert(request), chain=(member(info, "/images/a,b"),)).command
        options = "driver=vpc,force_size_calc=current_size,file.filename=/images/a,,b"
        assert command[-3:] == ("--image-opts", options, "/images/out")

    def test_displayed_command_has_every_option_of_the_result(self) -> None:
        """As it is run."""
        option = values.CreationOption(name="cluster_size", value="4096")
        asked = to("qcow2", options=(option,), preallocation=values.Preallocation.METADATA)
        plan = made(asked)
        assert "cluster_size=4096,preallocation=metadata" in plan.command
        assert set(plan.argv[:-2]) <= set(plan.command)

    @pytest.mark.parametrize("kind", sorted(values.WRITABLE_FORMATS))
    def test_out_of_order_writes_are_used_for_uncompressed_raw_only(self, kind: str) -> None:
        """It fragments other formats' files."""
        encryption = values.DestinationEncryption() if kind == "luks" else None
        argv = made(to(kind, encryption=encryption)).argv
        assert ("-W" in argv) is (kind == "raw")

    def test_compressed_results_are_written_out_of_order(self) -> None:
        """Half the time for the same file."""
        for compression in (values.Compression.ZLIB, values.Compression.ZSTD):
            argv = made(to("qcow2", compression=compression)).argv
            assert {"-c", "-W", "-m"} < set(argv)

    def test_zstd_compression_is_an_image_option(self) -> None:
        """The other is qemu's own default, which old readers know too."""
        zstd = made(to("qcow2", compression=values.Compression.ZSTD))
        zlib = made(to("qcow2", compression=values.Compression.ZLIB))
        assert after(zstd.argv, "-o") == "compression_type=zstd"
        assert "-o" not in zlib.argv
        assert zstd.compression is values.Compression.ZSTD

    def test_rate_limit_is_passed_to_qemu_img(self) -> None:
        """In bytes per second."""
        assert after(made(asked(rate_limit_bytes_per_second=MIB)).argv, "-r") == str(MIB)
        assert "-r" not in made().argv

    def test_image_options_are_passed_in_one_list(self) -> None:
        """As they were checked, and preallocation with them."""
        options = (
            values.CreationOption(name="cluster_size", value="65536"),
            values.CreationOption(name="compat", value="1.1"),
        )
        preallocation = values.Preallocation.METADATA
        a_grant = to("qcow2", options=options, preallocation=preallocation)
        expected = "cluster_size=65536,compat=1.1,preallocation=metadata"
        assert after(made(a_grant).argv, "-o") == expected

    def test_vhd_size_is_forced_to_be_exact(self) -> None:
        """By itself qemu rounds it to what a disk of 1990 could have had."""
        assert after(made(to("vpc")).argv, "-o") == "force_size=on"

    def test_vmdk_destination_is_passed_by_its_alias(self) -> None:
        """For a VMDK, which writes its own name down."""
        node = plan.Node(format="vmdk", fd=8, alias="/run/x/out.vmdk")
        facts = dataclasses.replace(FACTS, dest=node)
        assert made(to("vmdk"), facts).argv[-1] == "/run/x/out.vmdk"


class TestDeviceDestination:
    """A destination that is there already."""

    def test_destination_device_is_opened_with_explicit_options(self) -> None:
        """By one complete set of options: a name would be probed."""
        argv = made(RULES.convert(ONTO_DEVICE), ON_DEVICE).argv
        assert argv[-4:-2] == ("-n", "--target-image-opts")
        assert argv[-1] == "driver=raw,file.driver=host_device,file.filename=/proc/self/fd/8"
        assert "-O" not in argv
        assert "--target-is-zero" not in argv

    def test_claimed_zero_device_is_not_zeroed(self) -> None:
        """If that was claimed, and allowed."""
        blank = RULES.convert(grants.to(ONTO_DEVICE, is_zero=True))
        assert "--target-is-zero" in made(blank, ON_DEVICE).argv

    def test_destination_device_needs_no_free_space(self) -> None:
        """It has the size that it has."""
        planned = made(RULES.convert(ONTO_DEVICE), ON_DEVICE)
        assert (planned.needed_bytes, planned.available_bytes) == (0, 5 * GIB)


STAND_ALONE = {"raw", "luks"}


class TestGraph:
    """What qemu may open, all of it, down to an explicit null."""

    def test_chain_in_the_graph_ends_explicitly(self) -> None:
        """A header that is rewritten after the probe can't add a parent."""
        chain = (
            plan.Node(format="qcow2", fd=3),
            plan.Node(format="vmdk", fd=4, on_device=True),
            plan.Node(format="raw", fd=5),
        )
        assert graph_of(*chain) == {
            "driver": "qcow2",
            "file": {"driver": "file", "filename": "/proc/self/fd/3"},
            "backing": {
                "driver": "vmdk",
                "file": {"driver": "host_device", "filename": "/proc/self/fd/4"},
                "backing": {
                    "driver": "raw",
                    "file": {"driver": "file", "filename": "/proc/self/fd/5"},
                },
            },
        }

    @given(
        st.lists(
            st.builds(
                plan.Node,
                format=st.sampled_from(sorted(values.FORMATS)),
                fd=st.integers(3, 200),
                on_device=st.booleans(),
            ),
            min_size=1,
        )
    )
    def test_graph_names_only_descriptors(self, nodes: list[plan.Node]) -> None:
        """Every driver that could have a parent is told its parent, or that it has none."""
        graph: dict[str, Any] | None = graph_of(*nodes)
        for node in nodes:
            assert graph is not None
            driver = "host_device" if node.on_device else "file"
            assert graph["file"] == {"driver": driver, "filename": f"/proc/self/fd/{node.fd}"}
            parent = set() if node.format in STAND_ALONE else {"backing"}
            size = {"force_size_calc"} if node.format == "vpc" else set()
            assert graph.keys() == {"driver", "file"} | parent | size
            if node.format in STAND_ALONE:
                return  # nothing can lie under it
            graph = graph["backing"]
        assert graph is None

    def test_luks_node_has_its_key_by_secret_id(self) -> None:
        """Itself, or inside a qcow2; the passphrase is never here."""
        luks = graph_of(plan.Node(format="luks", fd=3), encrypted=True)
        assert luks["key-secret"] == "source"
        qcow2 = graph_of(plan.Node(format="qcow2", fd=3), encrypted=True)
        assert qcow2["encrypt"] == {"format": "luks", "key-secret": "source"}

    def test_secret_objects_precede_their_use(self) -> None:
        """Each by a pipe."""
        argv = plan.with_secrets(("qemu-img", "convert", "-p", "x"), {"source": 5, "dest": 6})
        assert argv == (
            *("qemu-img", "convert"),
            *("--object", "secret,id=source,file=/proc/self/fd/5"),
            *("--object", "secret,id=dest,file=/proc/self/fd/6"),
            *("-p", "x"),
        )


class TestEncryption:
    """Of the destination."""

    NAMED = (
        "key-secret=dest,cipher-alg=aes-256,cipher-mode=xts,hash-alg=sha256,"
        "ivgen-alg=plain64,ivgen-hash-alg=sha256,iter-time=2000"
    )

    def test_luks_destination_has_all_encryption_options(self) -> None:
        """Every value is stated, so that no other version of qemu chooses another."""
        argv = made(to("luks", encryption=values.DestinationEncryption())).argv
        assert after(argv, "-o") == self.NAMED

    def test_qcow2_destination_has_all_encryption_options(self) -> None:
        """The same values, by longer names."""
        argv = made(to("qcow2", encryption=values.DestinationEncryption())).argv
        inside = ",".join(f"encrypt.{item}" for item in self.NAMED.split(","))
        assert after(argv, "-o") == f"encrypt.format=luks,{inside}"

    def test_source_encryption_is_in_the_graph(self) -> None:
        """Whether or not the destination has any."""
        facts = dataclasses.replace(FACTS, chain=(plan.Node(format="luks", fd=7),))
        info = dataclasses.replace(INFO, format="luks", encrypted=True)
        argv = made(asked(source=ENCRYPTED), facts, (member(info),)).argv
        assert parsed(argv[-2])["key-secret"] == "source"


class TestCacheMode:
    """Which modes, and why."""

    def test_direct_io_is_used_where_both_ends_support_it(self) -> None:
        """Both ends past the page cache."""
        planned = made()
        assert planned.dest_cache == results.CacheChoice(
            mode=values.CacheMode.NONE, reason="the destination takes direct writes"
        )
        assert planned.source_cache == results.CacheChoice(
            mode=values.CacheMode.NONE, reason="the source can be read past the page cache"
        )

    def test_writeback_is_used_without_direct_io_and_the_reason_reported(self) -> None:
        """In the kernel's words."""
        facts = dataclasses.replace(FACTS, source_direct="Not here", dest_direct="Nor here")
        planned = made(facts=facts)
        assert planned.dest_cache == results.CacheChoice(
            mode=values.CacheMode.WRITEBACK,
            reason="the destination takes no direct writes: Nor here",
        )
        assert planned.source_cache == results.CacheChoice(
            mode=values.CacheMode.WRITEBACK,
            reason="the source can't be read past the page cache: Not here",
        )

    @pytest.mark.parametrize(
        ("buffered", "mode", "reason"),
        [
            (
                149 * MIB,
                "none",
                "takes direct writes: 100 MiB/s in a trial, 149 MiB/s through the page cache",
            ),
            (
                150 * MIB,
                "writeback",
                "from the page cache: 150 MiB/s in a trial, 100 MiB/s past the page cache",
            ),
        ],
    )
    def test_trial_decides_how_the_destination_is_written(
        self, buffered: int, mode: str, reason: str
    ) -> None:
        """With its figures; and nothing else about the plan changes."""
        rates = stages.WriteRates(direct_bytes_per_s=100 * MIB, buffered_bytes_per_s=buffered)
        before = dataclasses.replace(made(), method_reason="as was decided before")
        planned = plan.with_rates(before, rates)
        assert planned.dest_cache.mode == mode
        assert planned.dest_cache.reason.endswith(reason)
        assert after(planned.argv, "-t") == after(planned.command, "-t") == mode
        assert planned.write_behind is (mode == "writeback")
        assert planned.method_reason == "as was decided before"
        assert planned.source_cache == before.source_cache

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("facts", [FACTS, ON_DEVICE], ids=["file", "device"])
    def test_only_a_mode_that_was_not_requested_drops_a_file_from_the_page_cache(
        self, mode: values.CacheMode, facts: plan.Facts
    ) -> None:
        """Whoever wants `writeback` may want the result in memory; and a device is no new file."""
        request = ONTO_DEVICE if facts is ON_DEVICE else REQUEST
        a_grant = RULES.convert(dataclasses.replace(request, cache_mode=mode))
        with contextlib.suppress(conditions.NoDirectWrites):
            planned = made(a_grant, dataclasses.replace(facts, dest_direct="No"))
            expected = facts is FACTS and mode is values.CacheMode.AUTO
            assert planned.write_behind is expected

    @pytest.mark.parametrize("mode", MODES[1:])
    @pytest.mark.parametrize("refusal", [None, "Invalid argument"])
    def test_requested_cache_mode_is_used_or_refused(
        self, mode: values.CacheMode, refusal: str | None
    ) -> None:
        """Never another one in its place."""
        facts = dataclasses.replace(FACTS, dest_direct=refusal)
        a_grant = asked(cache_mode=mode)
        if refusal and mode in {values.CacheMode.NONE, values.CacheMode.DIRECTSYNC}:
            failure = refusals.refusal_of(lambda: made(a_grant, facts))
            assert failure is not None
            assert failure.reason == "NO_DIRECT_WRITES"
            assert failure.status is conditions.Status.FAILED_PRECONDITION
        else:
            planned = made(a_grant, facts)
            assert planned.dest_cache == results.CacheChoice(mode=mode, reason="asked for")
            assert after(planned.argv, "-t") == mode.value

    @pytest.mark.parametrize(
        ("refusal", "in_memory", "mode", "reason"),
        [
            (None, False, "none", "the source can be read past the page cache"),
            (None, True, "writeback", "the source is in the page cache already"),
            ("No", True, "writeback", "the source can't be read past the page cache: No"),
            ("No", False, "writeback", "the source can't be read past the page cache: No"),
        ],
    )
    def test_source_cache_mode_depends_on_its_page_cache_state(
        self, refusal: str | None, *, in_memory: bool, mode: str, reason: str
    ) -> None:
        """From memory, or else from the disk and past the memory, if it can be."""
        facts = dataclasses.replace(FACTS, source_direct=refusal, in_memory=in_memory)
        planned = made(asked(), facts)
        assert (planned.source_cache.mode, planned.source_cache.reason) == (mode, reason)
        assert after(planned.argv, "-T") == mode

    @given(
        st.sampled_from(MODES),
        st.none() | st.just("x"),
        st.none() | st.just("x"),
    )
    def test_plan_never_leaves_the_cache_mode_to_qemu(
        self,
        mode: values.CacheMode,
        source: str | None,
        dest: str | None,
    ) -> None:
        """No -t means `unsafe`: not one fdatasync."""
        facts = dataclasses.replace(FACTS, source_direct=source, dest_direct=dest)
        try:
            argv = made(asked(cache_mode=mode), facts).argv
        except conditions.NoDirectWrites:
            return
        safe = {item.value for item in MODES[1:]}
        assert after(argv, "-t") in safe
        assert after(argv, "-T") in safe


class TestSizeLimits:
    """What may be, and what it takes."""

    def test_virtual_size_over_the_limit_is_refused(self) -> None:
        """With both numbers."""
        large = dataclasses.replace(INFO, virtual_size_bytes=2 * GIB + 1)
        failure = refusals.refusal_of(lambda: made(chain=(member(large),)))
        assert failure is not None
        assert failure.reason == "IMAGE_TOO_LARGE"
        assert dict(failure.values)["limit_bytes"] == str(2 * GIB)
        just = dataclasses.replace(INFO, virtual_size_bytes=2 * GIB)
        assert made(chain=(member(just),)).virtual_size_bytes == 2 * GIB

    def test_required_space_is_that_of_the_chain_up_to_the_virtual_size(self) -> None:
        """But never more than the disk has."""
        small = member(dataclasses.replace(INFO, actual_size_bytes=10 * MIB), "/images/base")
        assert made(chain=(member(), small)).needed_bytes == 110 * MIB
        huge = member(dataclasses.replace(INFO, actual_size_bytes=5 * GIB), "/images/base")
        assert made(chain=(member(), huge)).needed_bytes == GIB

    @pytest.mark.parametrize(
        ("mode", "expected"),
        [
            (values.Preallocation.OFF, 100 * MIB),
            (values.Preallocation.METADATA, 100 * MIB),
            (values.Preallocation.FALLOC, GIB),
            (values.Preallocation.FULL, GIB),
        ],
    )
    def test_preallocated_result_needs_the_full_virtual_size(
        self, mode: values.Preallocation, expected: int
    ) -> None:
        """Holes and all."""
        assert made(to("qcow2", preallocation=mode)).needed_bytes == expected

    def test_compressed_result_has_no_known_required_space(self) -> None:
        """So nothing is demanded."""
        assert made(to("qcow2", compression=values.Compression.ZLIB)).needed_bytes == 0

    @pytest.mark.parametrize(("size", "virtual"), [(0, 0), (1, 512), (512, 512), (1025, 1536)])
    def test_raw_size_is_rounded_up_to_sectors(self, size: int, virtual: int) -> None:
        """As qemu rounds; nothing else is known of it, for it is not looked at."""
        info = plan.raw_info(size, 4096)
        expected = stages.ProbedImage(
            format="raw", virtual_size_bytes=virtual, actual_size_bytes=4096
        )
        assert info == expected


class TestPlanWarnings:
    """What a conversion leaves behind without a word from qemu-img."""

    def test_lost_snapshots_and_bitmaps_are_reported_in_warnings(self) -> None:
        """And an image that was not closed is named as such."""
        info = dataclasses.replace(INFO, snapshots=("a", "b"), bitmaps=("c",), dirty=True)
        assert made(chain=(member(info),)).warnings == (
            results.Warning(
                reason="SNAPSHOTS_DROPPED",
                message="2 internal snapshots of the source are not in the result",
            ),
            results.Warning(
                reason="BITMAPS_DROPPED", message="1 bitmaps of the source are not in the result"
            ),
            results.Warning(
                reason="SOURCE_DIRTY",
                message="the source was not closed cleanly: its dirty flag is set",
            ),
        )

    def test_image_without_snapshots_or_bitmaps_has_no_warning(self) -> None:
        """Nor of what lies under the source, which is only read."""
        below = member(dataclasses.replace(INFO, snapshots=("a",)), "/images/base")
        assert made(chain=(member(), below)).warnings == ()


class TestOtherCommands:
    """qemu-img info and compare."""

    def test_info_command_uses_one_format_and_one_descriptor(self) -> None:
        """In the sandbox, and of one descriptor."""
        assert plan.info_argv(7, "vmdk", shared=True) == (
            *("qemu-img", "info", "--output=json", "--force-share", "-f", "vmdk"),
            "/proc/self/fd/7",
        )

    def test_vhd_is_always_opened_with_its_current_size(self) -> None:
        """Not what its geometry comes to."""
        assert plan.info_argv(7, "vpc") == (
            *("qemu-img", "info", "--output=json", "--image-opts"),
            "driver=vpc,force_size_calc=current_size,file.filename=/proc/self/fd/7",
        )
        node = plan.Node(format="vpc", fd=7)
        for argv in (plan.map_argv(node), plan.check_argv(node)):
            assert parsed(argv[-1])["force_size_calc"] == "current_size"

    def test_map_command_accepts_a_range(self) -> None:
        """Where it begins, and how long it is, in bytes."""
        stretch = plan.Stretch(start_bytes=512, length_bytes=1024)
        argv = plan.map_argv(plan.Node(format="parallels", fd=7), stretch=stretch)
        assert argv[3:5] == ("--start-offset=512", "--max-length=1024")

    def test_compare_command_uses_the_graph_of_the_conversion(self) -> None:
        """The same graph, and the result alone with its own key."""
        a_grant = RULES.convert(
            dataclasses.replace(
                grants.to(REQUEST, format="qcow2", encryption=values.DestinationEncryption()),
                source=ENCRYPTED,
            )
        )
        source, dest = plan.Node(format="luks", fd=7), plan.Node(format="qcow2", fd=8)
        argv = plan.compare_argv(a_grant, made(a_grant), (source,), dest)
        assert argv[:4] == ("qemu-img", "compare", "-T", "none")
        read, written = (parsed(item) for item in argv[4:])
        assert read["key-secret"] == "source"
        assert written["encrypt"]["key-secret"] == "dest"
        assert written["backing"] is None
        assert "size" not in written

    def test_compare_command_on_a_larger_device_ends_with_the_image(self) -> None:
        """What lies beyond it is not the image's."""
        a_grant = RULES.convert(ONTO_DEVICE)
        argv = plan.compare_argv(a_grant, made(a_grant, ON_DEVICE), FACTS.chain, ON_DEVICE.dest)
        assert parsed(argv[-1]) == {
            "driver": "raw",
            "file": {"driver": "host_device", "filename": "/proc/self/fd/8"},
            "size": GIB,
        }


options_of = {
    kind: st.lists(
        st.sampled_from(
            [
                values.CreationOption(name=name, value=value)
                for name, option in names.items()
                for value in ("on", "off", "1", "4096", "1048576", "dynamic", "ide", "1.1")
                if option.accepts(value)
            ]
        ),
        unique_by=lambda option: option.name,
    )
    for kind, names in creation_options.OPTIONS.items()
}


@given(st.data())
def test_validated_option_value_can_not_add_another_option(data: st.DataObject) -> None:
    """A comma or a blank in a value would begin another option."""
    kind = data.draw(st.sampled_from(sorted(options_of)))
    options = tuple(data.draw(options_of[kind]))
    try:
        argv = made(to(kind, options=options)).argv
    except conditions.BadOption:
        return  # each is fine, but they don't go together
    given_names = {option.name for option in options} | ({"force_size"} if kind == "vpc" else set())
    passed = after(argv, "-o").split(",") if "-o" in argv else []
    assert {item.partition("=")[0] for item in passed} == given_names
