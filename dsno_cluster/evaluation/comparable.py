"""The settings on which the figures of an evaluation depend, as metrics.json records them: whether two evaluations are equal."""

from __future__ import annotations

from dsno_cluster.evaluation.look_up import Comparison, ImagesComparison
from dsno_cluster.evaluation.records import ExtractorName, Metrics, ReferenceFacts
from dsno_cluster.records import Values


def setting_differences(before: Metrics, comparison: Comparison) -> list[str]:
    """The settings in which an earlier evaluation differs from this one; what it did not record is taken to be the same."""
    settings = comparison.config.evaluation
    same = {
        "num_samples": before.num_samples == settings.num_samples,
        "protocol": before.protocol == settings.protocol,
        "draws": before.draws == settings.draws,
        "the feature extractor": before.feature_extractor == extractor_of(comparison),
        "other extractors": before.other_extractors == other_extractors_of(comparison),
        "the reference": _same_reference(before.reference, comparison),
        "seed": before.seeds.noise in (None, settings.seed),
        "metric_seed": before.seeds.metrics in (None, settings.metric_seed),
        "precision": before.precision == settings.precision,
        "the decoder": before.decoder == decoder_of(comparison),
    }
    return [what for what, is_same in same.items() if not is_same]


def _same_reference(before: ReferenceFacts, comparison: Comparison) -> bool:
    identity = comparison.real.identity
    if before.identity is None or identity is None:
        return before.what == comparison.config.evaluation.reference
    return before.identity == identity.model_dump(mode="json")


def decoder_of(comparison: Comparison) -> Values | None:
    """The identity of the decoder of the states, if they are latents."""
    decoder = comparison.decoder
    return None if decoder is None else decoder.model_dump(mode="json")


def extractor_of(comparison: Comparison | ImagesComparison) -> ExtractorName:
    """The main extractor, with its weights only if a metric reads it."""
    main = comparison.config.evaluation.feature_extractor
    file = comparison.weights.get(main)
    return ExtractorName(name=main, weights_sha256=file.sha256 if file else None)


def other_extractors_of(comparison: Comparison | ImagesComparison) -> dict[str, str]:
    """The sha256 of the weights of each further extractor."""
    main = comparison.config.evaluation.feature_extractor
    return {name: file.sha256 for name, file in comparison.weights.items() if name != main}
