"""convertctl's commands and their options."""

from __future__ import annotations

import typing
from typing import Final, Unpack

import click

import convertd_client
from convertd_client import conversion, errors, local
from convertd_client.cli import (
    convert_command,
    creation_options,
    error_output,
    json_output,
    render,
    signals,
    values,
)

SHELLS: Final = ("bash", "zsh", "fish")


def run() -> int:
    """Run this process's command line, and return its exit status."""
    try:
        status = convertctl.main(prog_name="convertctl", standalone_mode=False)
    except click.ClickException as error:
        # click would print arguments unescaped, such as file names that a shell expanded.
        error_output.say_misused(error)
        return error.exit_code
    return status if isinstance(status, int) else 0


class Commands(click.Group):
    """The group of commands, which turns a ConvertError into a line and an exit status."""

    def invoke(self, ctx: click.Context) -> object:
        """Run a command. Exit with a line and status 1 on ConvertError, with 130 on Ctrl-C."""
        try:
            return super().invoke(ctx)
        except errors.ConvertError as error:
            if ctx.meta.get("json"):
                json_output.error_line(error)
            else:
                error_output.say(error, is_local=ctx.meta.get("local", False))
            ctx.exit(1)
        except KeyboardInterrupt:
            # click would print "Aborted!" and exit with 1.
            ctx.exit(signals.INTERRUPTED)


def _remember_json(ctx: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001
    ctx.meta["json"] = value


def _remember_local(ctx: click.Context, _: click.Parameter, value: bool) -> bool:  # noqa: FBT001
    ctx.meta["local"] = value
    return value


as_json = click.option(
    "--json",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_remember_json,
    help="Print JSON, one object per line.",
)
source_format = click.option(
    "-f",
    "--source-format",
    metavar="FORMAT",
    shell_complete=values.complete_format,
    help="The image's format. State it if you know it; without it, convertd finds the format.",
)
without_daemon = click.option(
    "--local",
    "is_local",
    is_flag=True,
    callback=_remember_local,
    help="Convert without the daemon, with only your own rights.",
)


@click.group(
    cls=Commands,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--socket",
    metavar="PATH",
    type=values.PATH,
    help="The daemon's socket. [default: $CONVERTD_SOCKET, or /run/convertd/convertd.sock]",
)
@click.version_option(package_name="convertd")
@click.pass_context
def convertctl(ctx: click.Context, socket: str | None) -> None:
    """Convert disk images through convertd."""
    ctx.obj = socket


def _client() -> convertd_client.Client:
    try:
        return convertd_client.Client(click.get_current_context().obj)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


class Given(conversion.ConvertOptions):
    """The options of `convert`, as click passes them."""

    dest_format: str
    timeout: float | None
    is_local: bool
    quiet: bool


@convertctl.command()
@click.argument("source", type=values.PATH)
@click.argument("dest", type=values.PATH)
@click.option(
    "-O",
    "--dest-format",
    metavar="FORMAT",
    required=True,
    shell_complete=values.complete_format,
    help="The format to convert to.",
)
@source_format
@click.option(
    "-c", "--compress", is_flag=True, help="Compress DEST as the policy says (default: zlib)."
)
@click.option(
    "--compression", type=click.Choice(["zlib", "zstd"]), help="Compress DEST with this method."
)
@click.option(
    "--cache",
    "cache_mode",
    type=click.Choice(["auto", "none", "writeback", "writethrough", "directsync"]),
    default="auto",
    show_default=True,
    help="How to write DEST. With every mode, DEST is on disk at the end.",
)
@click.option(
    "--reflink",
    type=click.Choice(["auto", "never", "always"]),
    default="auto",
    show_default=True,
    help="Share blocks with SOURCE: if possible, never, or else fail.",
)
@click.option("--overwrite", is_flag=True, help="Replace DEST if it exists, in one step.")
@click.option(
    "--mode",
    metavar="MODE",
    callback=values.parsed(values.parse_mode),
    help="DEST's permissions, such as 0640.",
)
@click.option("--group", metavar="GROUP", help="DEST's group, one of yours.")
@click.option(
    "--preallocation",
    type=click.Choice(["off", "metadata", "falloc", "full"]),
    help="Reserve space in advance.",
)
@click.option(
    "--rate-limit",
    metavar="SIZE",
    callback=values.parsed(values.parse_size),
    help="Read at most this much per second, such as 50M.",
)
@click.option(
    "--source-secret-file",
    "source_secret",
    type=values.PATH,
    callback=values.parsed(values.read_secret),
    help="File with SOURCE's passphrase.",
)
@click.option(
    "--dest-secret-file",
    "dest_secret",
    type=values.PATH,
    callback=values.parsed(values.read_secret),
    help="File with DEST's passphrase.",
)
@creation_options.options
@click.option(
    "--accept-damaged",
    is_flag=True,
    help="Accept a qcow2 with wrong reference counts, if all its data is there.",
)
@click.option("--verify", is_flag=True, help="Compare DEST with SOURCE before it gets its name.")
@click.option("--dry-run", "validate_only", is_flag=True, help="Only check and plan.")
@click.option("--label", default="", help="Your name for the job.")
@click.option(
    "--timeout",
    metavar="TIME",
    callback=values.parsed(values.parse_time),
    help="Give up after this time, such as 10m.",
)
@without_daemon
@as_json
@click.option("-q", "--quiet", is_flag=True, help="Print only warnings and errors.")
def convert(source: str, dest: str, **given: Unpack[Given]) -> None:
    """Convert the image SOURCE into a new image DEST.

    DEST appears complete or not at all. Ctrl-C cancels.
    """
    paths = conversion.absolute(source), conversion.absolute(dest)
    names = conversion.ConvertOptions.__optional_keys__
    chosen = {name: value for name, value in given.items() if name in names}
    options = typing.cast("conversion.ConvertOptions", chosen)
    ending: typing.Any = {"overwrite": given["overwrite"], "timeout_s": given["timeout"]}
    if given["is_local"]:
        running = local.conversion_of(*paths, given["dest_format"], options)
        convert_command.run(running, paths[1], **ending)
        return
    with _client() as client:
        remote = convert_command.Remote(client, paths, given["dest_format"], options)
        convert_command.run(remote, paths[1], **ending)


@convertctl.command()
@click.argument("path", type=values.PATH)
@source_format
@without_daemon
@as_json
@click.pass_context
def info(ctx: click.Context, path: str, source_format: str | None, *, is_local: bool) -> None:
    """Describe the image at PATH."""
    if is_local:
        image = local.inspect(path, source_format)
    else:
        with _client() as client:
            image = client.inspect(conversion.absolute(path), source_format)
    if ctx.meta.get("json"):
        json_output.line(image)
    else:
        render.image(image)
        error_output.warn_of(image.warnings)


@convertctl.command()
@as_json
@click.pass_context
def jobs(ctx: click.Context) -> None:
    """List your conversions that wait or run.

    An operator sees the conversions of everybody.
    """
    with _client() as client:
        listed = client.jobs()
    if not ctx.meta.get("json"):
        render.jobs(listed)
        return
    for job in listed:
        json_output.line(job)


@convertctl.command()
@click.argument("job_id", metavar="ID")
@as_json
@click.pass_context
def cancel(ctx: click.Context, job_id: str) -> None:
    """Cancel the job ID."""
    with _client() as client:
        job = client.cancel(job_id)
    if ctx.meta.get("json"):
        json_output.line(job)
    else:
        click.echo(f"job {job.job_id} is being cancelled")


@convertctl.command()
@as_json
@click.pass_context
def access(ctx: click.Context) -> None:
    """Show who you are for the daemon, and what you may do."""
    with _client() as client:
        answer = client.access()
    if ctx.meta.get("json"):
        json_output.line(answer)
    else:
        render.access(answer)


@convertctl.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script that makes SHELL complete convertctl's arguments.

    For bash: source <(convertctl completion bash)
    """
    from click import shell_completion  # noqa: PLC0415 - slow to import, and rarely wanted

    kind = shell_completion.get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    click.echo(kind(convertctl, {}, "convertctl", "_CONVERTCTL_COMPLETE").source())
