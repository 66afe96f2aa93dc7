"""Maps made after training, of a network without attention: `gradcam` and `input-gradient`.

The network is `none`, weight for weight; its maps say which pixels its answer hung on. They need a
backward pass for each image. From captum (Kokhlikyan et al., 2020), which does the derivatives.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mnistattn.errors import InputError
from mnistattn.models.network import Network


class PostHoc(Network):
    """`none`, with `attend`, which explains the answer given (the class with the largest logit)."""

    def attend(
        self, images: Tensor, query: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, dict]:
        """As Network.attend, with one map (B, 1, h, w) >= 0, not normalised."""
        with torch.inference_mode(False), torch.enable_grad():
            # Tensors of an inference mode outside this one have no derivative; copies do.
            images, query = images.clone(), query.clone()
            logits, out = self(images, query)
            explained = self.explain(images, query, logits.argmax(1))
        return logits.detach(), out | {"attention": [explained.detach()]}

    def explain(self, images: Tensor, query: Tensor, answer: Tensor) -> Tensor:
        """Images (B, 3, S, S), the query and the answer to explain (B,) -> map (B, 1, h, w)."""
        raise NotImplementedError

    def _logits(self, images: Tensor, query: Tensor) -> Tensor:
        return self(images, query)[0]


class GradCAM(PostHoc):
    """Channels of the last convolution (12 x 12 of a 100-pixel image), each weighted by the mean
    derivative of the answer's logit, summed, and cut at 0 (Selvaraju et al., ICCV 2017)."""

    def explain(self, images: Tensor, query: Tensor, answer: Tensor) -> Tensor:
        """See PostHoc."""
        method = _captum("LayerGradCam")(self._logits, self.convs[-1])
        return method.attribute(
            images, answer, additional_forward_args=(query,), relu_attributions=True
        )


class InputGradient(PostHoc):
    """The derivative of the answer's logit by each pixel, absolute, the largest of its three
    channels (Simonyan et al., ICLR workshop 2014)."""

    def explain(self, images: Tensor, query: Tensor, answer: Tensor) -> Tensor:
        """See PostHoc."""
        images.requires_grad_()
        slopes = _captum("Saliency")(self._logits).attribute(
            images, answer, additional_forward_args=(query,)
        )
        return slopes.amax(1, keepdim=True)


def _captum(name: str) -> Callable:
    try:
        import captum.attr
    except ImportError as error:
        raise InputError("this model needs captum: pip install 'mnistattn[board]'.") from error
    return getattr(captum.attr, name)
