"""Background source `sun397`: the SUN397 photos (Xiao et al. 2010), through torchvision.

108,754 photos, 37 GB: downloaded only when this source is asked for by name.
"""

from pathlib import Path

from mnistattn.errors import InputError


def sun397_folder(data_root: Path) -> Path:
    """The folder of SUN397's photos in data_root; downloads them if it is missing."""
    folder = Path(data_root) / "SUN397"
    if not folder.is_dir():
        from torchvision.datasets import SUN397

        try:
            SUN397(str(data_root), download=True)
        except Exception as error:  # torchvision lets URLError, RuntimeError, OSError ... through
            raise InputError(
                f"SUN397 is not in {folder} and could not be downloaded "
                f"({type(error).__name__}): use --backgrounds textures or a folder of photos."
            ) from error
    return folder
