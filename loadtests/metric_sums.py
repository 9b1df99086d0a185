"""Prometheus's text, read as one number for each name."""

from prometheus_client.parser import text_string_to_metric_families

__all__ = ("metric_sums",)


def metric_sums(text: str) -> dict[str, float]:
    """Values by the name of their sample, summed over labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found
