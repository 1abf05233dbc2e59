"""vlaexp: fine-tune vision-language-action robot policies and find out, honestly, what worked."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlaexp.trainer.policy_folder import load_policy as load_policy

__all__ = ["load_policy"]


def __getattr__(name: str) -> Any:
    # Late, so that `import vlaexp` and the command line do not wait for torch.
    if name == "load_policy":
        from vlaexp.trainer.policy_folder import load_policy

        return load_policy
    raise AttributeError(f"module 'vlaexp' has no attribute {name!r}")
