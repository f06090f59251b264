"""What the packages of this distribution have in common: they take nobody's place."""

from importlib import metadata


def refuse_to_shadow(package: str, *distributions: str) -> None:
    """Raises ImportError where one of `distributions`, the owners of `package`, is installed.

    The package is last on sys.path, so this happens only where something reordered that.
    """
    for distribution in distributions:
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        raise ImportError(
            f"{distribution} {version} is installed, and the {package!r} of gated-deltanet-fla does"
            f" not take its place. Keep one of the two: 'pip uninstall {distribution}' or"
            " 'pip uninstall gated-deltanet-fla'.",
            name=package,
        )
