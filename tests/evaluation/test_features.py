import pytest
import torch
from torch import nn

from momatch.evaluation.features import (
    Classifier,
    ClassifierFeatures,
    FeatureExtractor,
    PixelFeatures,
    check_features,
    extract,
)
from momatch.evaluation.statistics import FeatureStatistics


class TinyClassifier(nn.Module):
    """Label = index of the brightest pixel; features = pixels doubled."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.dropout = nn.Dropout(0.5)

    def features(self, images):
        return self.dropout(images.flatten(1) * self.gain)

    def forward(self, images):
        return self.features(images)


def test_extractors_fit_their_protocols():
    classifier = ClassifierFeatures(TinyClassifier(), "tiny")
    assert isinstance(PixelFeatures(), FeatureExtractor)
    assert isinstance(classifier, FeatureExtractor)
    as_classifier: Classifier = classifier
    assert as_classifier.name == "tiny"


def test_classifier_features_switch_dropout_off_and_keep_no_graph():
    images = torch.randn(5, 1, 2, 2)
    classifier = ClassifierFeatures(TinyClassifier().train(), "tiny")
    assert torch.equal(classifier(images), 2 * images.flatten(1))
    assert not classifier(images).requires_grad
    assert torch.equal(classifier.predict(images), images.flatten(1).argmax(1))


def test_classifier_without_features_is_refused():
    with pytest.raises(ValueError, match="Linear has no method features"):
        ClassifierFeatures(nn.Linear(2, 2), "linear")


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_extract_does_not_depend_on_batching(batch_size):
    images = torch.randn(7, 1, 2, 2, dtype=torch.float64)
    whole = extract(PixelFeatures(), images, batch_size)
    assert whole.dtype == torch.float32 and whole.shape == (7, 4)
    pulled = extract(PixelFeatures(), (part for part in images.split(3)), batch_size)
    assert torch.equal(whole, pulled)
    assert torch.equal(whole, images.flatten(1).float())


def test_extract_refuses_nothing_and_wrong_shapes():
    with pytest.raises(ValueError, match="no pictures"):
        extract(PixelFeatures(), [])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        extract(PixelFeatures(), torch.zeros(2, 1, 2, 2), 0)

    class Broken:
        name = "broken"

        def __call__(self, images):
            return images

    with pytest.raises(ValueError, match=r"'broken' have shape \(2, 1, 2, 2\)"):
        extract(Broken(), torch.zeros(2, 1, 2, 2))


def test_bad_features_are_named():
    features = torch.zeros(10, 3)
    features[2, 1], features[7, 0], features[7, 2] = float("nan"), float("inf"), float("nan")
    with pytest.raises(ValueError, match="2 of 10 generated samples have NaN or infinite"):
        check_features(features, "generated")
    with pytest.raises(ValueError, match="1 reference samples are too few; give at least 2"):
        check_features(torch.zeros(1, 3), "reference")
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        check_features(torch.zeros(3), "reference")


def test_statistics_are_the_textbook_moments(tmp_path):
    features = torch.randn(50, 4) + 100
    statistics = FeatureStatistics.from_features(features)
    assert torch.allclose(statistics.mean, features.double().mean(0))
    assert torch.allclose(statistics.covariance, torch.cov(features.double().T))
    statistics.save(tmp_path / "real.safetensors")
    loaded = FeatureStatistics.load(tmp_path / "real.safetensors")
    assert torch.equal(loaded.mean, statistics.mean) and torch.equal(loaded.covariance, statistics.covariance)
    assert loaded.n == 50


def test_statistics_refuse_what_does_not_belong_together(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(ValueError, match="do not belong together"):
        FeatureStatistics(torch.zeros(3), torch.zeros(2, 2), 5)
    with pytest.raises(ValueError, match="too few"):
        FeatureStatistics.from_features(torch.zeros(1, 2))
    save_file({"weights": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not feature statistics"):
        FeatureStatistics.load(tmp_path / "other.safetensors")


def test_averaged_pixels_say_so_and_small_pictures_are_left_alone():
    from momatch.data.images import ImageSet
    from momatch.evaluation.builtin import pixel_features

    small, large = torch.rand(3, 1, 8, 8), torch.rand(3, 3, 16, 32)
    for images, name, width in ((small, "pixels", 64), (large, "pixels averaged to 8×8", 3 * 64)):
        extractor = pixel_features(ImageSet(images, torch.zeros(3, dtype=torch.long), 1, "any"))
        assert extractor.name == name and extractor(images).shape == (3, width)
    torch.testing.assert_close(
        pixel_features(ImageSet(small, torch.zeros(3), 1, "any"))(small), small.flatten(1)
    )
    torch.testing.assert_close(extractor(large)[0, 0], large[0, 0, :2, :4].mean())
