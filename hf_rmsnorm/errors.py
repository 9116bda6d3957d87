"""The errors users meet. Both name the module or file, what was found and what to do."""


class PatchError(ValueError):
    """A model cannot be patched as asked. Raised before anything was changed."""


class VerificationError(RuntimeError):
    """A patch called exact moved the model's outputs. The patch has been undone."""
