"""Classifier-free guidance with two conditions, renormalised, and the Euler step of a flow: ``x' = x - v dt``.

c, u, w are the velocities with every condition, without the text, without the images; a and b the text and image
scales; m = renorm_min. As in BAGEL (Deng et al. 2025, arXiv:2505.14683; guidance: Ho & Salimans 2022,
arXiv:2207.12598, two conditions as in InstructPix2Pix, arXiv:2211.09800), with f(g) = clamp(|c| / (|g| + 1e-8), m, 1):

    a <= 1                         v = c, whatever b
    renorm global or channel       g = u + a (c - u);  if b > 1: g = w + b (g - w);  v = f(g) g
    renorm text_channel            g = u + a (c - u);  g = f(g) g;  v = w + b (g - w) if b > 1, else g

``global`` takes one L2 norm over all rows given (one image), the other two one norm per row. f never amplifies.
Arithmetic is float32, or float64 for float64 velocities; x' is float32 or wider.

Traffic: reads x and the velocities, writes x', each [N, C]; memory-bound.
"""

import torch
from torch.compiler import is_compiling


def guided_velocity_reference(v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min):
    """The formula, in PyTorch, for any device and dtype. Shapes as in :func:`guided_velocity`."""
    cond = _widen(v_cond)
    if text_scale <= 1:
        return cond
    guided = _extrapolate(_widen(v_no_text), cond, text_scale)
    if renorm == "text_channel":
        guided = _renormalise(guided, cond, -1, renorm_min)
    if image_scale > 1:
        guided = _extrapolate(_widen(v_no_img), guided, image_scale)
    if renorm != "text_channel":
        guided = _renormalise(guided, cond, None if renorm == "global" else -1, renorm_min)
    return guided


def _widen(v):
    return v.float() if v.dtype.itemsize < 4 else v


def _extrapolate(origin, target, scale):
    return torch.add(origin, target - origin, alpha=scale)


def _renormalise(guided, cond, dim, smallest):
    norm_cond = torch.linalg.vector_norm(cond, dim=dim, keepdim=True)
    norm_guided = torch.linalg.vector_norm(guided, dim=dim, keepdim=True)
    return guided * (norm_cond / (norm_guided + 1e-8)).clamp(smallest, 1)


def guided_step_reference(x, v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min, dt):
    """The formula, in PyTorch, for any device and dtype. Shapes as in :func:`guided_step`."""
    x = _widen(x)
    v = guided_velocity_reference(v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min)
    return torch.sub(x, v.to(x.dtype), alpha=dt)


torch.library.define(
    "bagel_rt::guided_step",
    "(Tensor x, Tensor v_cond, Tensor? v_no_text, Tensor? v_no_img, float text_scale, float image_scale, str renorm, "
    "float renorm_min, float dt) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _launch(x, v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min, dt):
    return guided_step_reference(x, v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min, dt)


torch.library.impl("bagel_rt::guided_step", "default", _launch)


@torch.library.register_fake("bagel_rt::guided_step")
def _fake(x, v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min, dt):
    return torch.empty_like(_widen(x))


_guided_step = torch.ops.bagel_rt.guided_step.default


def guided_velocity(v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min):
    """Combine the branches' velocities of one image into the one to follow.

    Args:
        v_cond: [N, C] velocity under every condition, floating point.
        v_no_text: [N, C] without the text; needed when ``text_scale`` > 1, otherwise ignored.
        v_no_img: [N, C] without the images; needed when both scales are > 1, otherwise ignored.
        text_scale, image_scale: guidance scales; 1 or less switches a guidance off, and no text guidance means none.
        renorm: "global", "channel" or "text_channel".
        renorm_min: the least factor a renorm may shrink by; 1 switches it off.

    Returns:
        [N, C], float32 (float64 for float64 velocities); without guidance this may be ``v_cond`` itself.

    Raises:
        ValueError: a needed velocity is missing, shapes or dtypes disagree, or ``renorm`` is unknown.
    """
    _check("guided_velocity", v_cond.shape, v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm)
    return guided_velocity_reference(v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min)


def guided_step(x, v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min, dt):
    """Take one Euler step of one image along the guided velocity.

    Args:
        x: [N, C] latents, floating point.
        v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min: as in :func:`guided_velocity`,
            velocities shaped like ``x``.
        dt: time from this step down to the next, positive when denoising.

    Returns:
        x - v dt: [N, C], float32 (float64 for float64 ``x``), a new tensor.

    Raises:
        ValueError: as :func:`guided_velocity`.
    """
    _check("guided_step", x.shape, v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm)
    run = _guided_step if is_compiling() else _launch
    return run(x, v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min, dt)


def _check(op, shape, v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm):
    if renorm not in ("global", "channel", "text_channel"):
        raise ValueError(f"{op}: renorm={renorm!r} is not one of 'global', 'channel', 'text_channel'")
    if text_scale > 1 and v_no_text is None:
        raise ValueError(f"{op}: text_scale={text_scale} guides away from v_no_text, which is None")
    if text_scale > 1 and image_scale > 1 and v_no_img is None:
        raise ValueError(f"{op}: image_scale={image_scale} guides away from v_no_img, which is None")
    for name, v in (("v_cond", v_cond), ("v_no_text", v_no_text), ("v_no_img", v_no_img)):
        if v is not None and (v.shape != shape or v.dtype != v_cond.dtype):
            raise ValueError(f"{op}: {name} is {tuple(v.shape)} {v.dtype}, expected {tuple(shape)} {v_cond.dtype}")
