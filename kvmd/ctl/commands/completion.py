"""``kvmctl completion``: what a shell needs to complete commands, options and machines."""

from __future__ import annotations

import click

from kvmd.ctl.session import Session, ctl_command


@ctl_command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(session: Session, *, shell: str) -> None:
    """Print what lets a shell complete commands, options and the names of machines.

    \b
    bash   eval "$(kvmctl completion bash)"                              in ~/.bashrc
    zsh    eval "$(kvmctl completion zsh)"                               in ~/.zshrc
    fish   kvmctl completion fish > ~/.config/fish/completions/kvmctl.fish
    """  # noqa: D301 - the backslash is click's: what follows is not to be wrapped
    from click.shell_completion import get_completion_class  # noqa: PLC0415 - only here

    found = get_completion_class(shell)
    assert found is not None  # noqa: S101 - click knows the three
    root = click.get_current_context().find_root().command
    script = found(root, {}, "kvmctl", "_KVMCTL_COMPLETE").source()
    session.answer({"shell": shell, "script": script}, script)
