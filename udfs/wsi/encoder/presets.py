"""The table of presets: one row per published encoder of tiles, as its card says; comments say where sources disagree.

Revisions and hashes are those that raw2features pins; None means that no source confirms one.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from udfs.wsi.encoder.preset import Licence, Preset

_HALF = (0.5, 0.5, 0.5)
_FOUR_SCALES = (0.5, 0.25, 1.0, 2.0)  # um/px
_BIOPTIMUS_MEAN, _BIOPTIMUS_STD = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
_HIBOU_MEAN, _HIBOU_STD = (0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816)
_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}

_APACHE, _MIT = Licence("Apache-2.0", is_commercial=True), Licence("MIT", is_commercial=True)
_DINOV3, _GPL = Licence("DINOv3 licence", is_commercial=True), Licence("GPL-3.0, academic use", is_commercial=False)
_CC_BY_NC_ND = Licence("CC-BY-NC-ND-4.0", is_commercial=False)
_OWKIN, _KAIKO, _LUNIT = (Licence(f"{who} non-commercial", is_commercial=False) for who in ("Owkin", "Kaiko", "Lunit"))

_TRIDENT, _RAW2FEATURES, _SLIDE2VEC = "mahmoodlab/TRIDENT", "CraigMyles/raw2features", "clemsgrs/slide2vec"
_EVA, _STAMP, _LAZYSLIDE = "kaiko-ai/eva", "KatherLab/STAMP", "rendeirolab/lazyslide-models"


def _kaiko(size: str, patch: int, dim: int, architecture: str, repository: str, **other: Any) -> Preset:
    """Return a model of kaiko.ai's first family: bilinear, mean and standard deviation 0.5."""
    return Preset(
        name=f"kaiko-vit{size}{patch}",
        architecture=architecture,
        repository=f"1aurent/{repository}.kaiko_ai_towards_large_pathology_fms",
        mean=_HALF,
        std=_HALF,
        interpolation="bilinear",
        dim=dim,
        precision="fp32",
        licence=_KAIKO,
        sources=(_TRIDENT, "kaiko-ai/towards_large_pathology_fms"),
        **other,
    )


def _dinov(version: int, size: str, dim: int, **other: Any) -> Preset:
    """Return a model of natural images: DINOv2 at 224 px (trained at 518), DINOv3 at 256 px as timm runs it."""
    name = {"s": "small", "b": "base", "l": "large", "g": "giant"}[size]
    patch, data, input_px = {2: (14, "lvd142m", 224), 3: (16, "lvd1689m", 256)}[version]
    architecture = f"vit_{name}_patch{patch}_dinov{version}"
    return Preset(
        name=f"dinov{version}-{size}",
        architecture=architecture,
        kwargs=MappingProxyType({"img_size": 224} if version == 2 else {}),
        repository=f"timm/{architecture}.{data}",
        input_px=input_px,
        tile_px=input_px,
        dim=dim,
        mpps=(),
        licence=_APACHE if version == 2 else _DINOV3,
        sources=("huggingface/pytorch-image-models",),
        **other,
    )


_VIRCHOW = Preset(
    name="virchow",
    architecture="vit_huge_patch14_224",
    kwargs={"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.3375, **_SWIGLU},
    repository="paige-ai/Virchow",
    revision="19eebc84ae33e79f1b2d866e6ff90ae50e522f9a",
    sha256="3416891b37a2349a2d9ce7ecf00b64a6277011b41351436c1ceb0abb80805408",
    pooling="cls_mean",
    dim=2560,
    licence=_APACHE,
    is_gated=True,
    sources=(_TRIDENT, _RAW2FEATURES),
)
_H_OPTIMUS_0 = Preset(
    name="h-optimus-0",
    architecture="vit_giant_patch14_reg4_dinov2",
    kwargs={"img_size": 224, "init_values": 1e-5},
    repository="bioptimus/H-optimus-0",
    revision="b145cc1e6c6b30d3251aa8b1f844e6974188a743",
    file="pytorch_model.bin",
    sha256="bf47b8467403079798661601b6ab06533be789da48d3f8b510aaefe2fbc55cd3",
    mean=_BIOPTIMUS_MEAN,
    std=_BIOPTIMUS_STD,
    dim=1536,
    licence=_APACHE,
    is_gated=True,
    sources=(_RAW2FEATURES, _SLIDE2VEC),
)
_HIBOU_B = Preset(
    name="hibou-b",
    architecture="vit_base_patch14_reg4_dinov2",
    kwargs={"img_size": 224, "mlp_ratio": 4096 / 768, **_SWIGLU},
    repository="histai/hibou-b",
    revision="7fdc8cce365ebfd9e7e60ee6ee9a8d4d59388f3c",
    sha256="2121db3cac83bc9abf13a458a37b0740e2ce725609ff8d4b8e6b6c56c30c3ab6",
    layout="Dinov2WithRegisters",
    mean=_HIBOU_MEAN,
    std=_HIBOU_STD,
    dim=768,
    licence=_APACHE,
    is_gated=True,
    sources=(_RAW2FEATURES, _SLIDE2VEC, "HistAI/hibou"),
)
# Mean and standard deviation are those of the cards on the hub. eva quotes others for both: .703, .536, .661; .217, .261, .207.
_LUNIT_VITS8 = Preset(
    name="lunit-vits8",
    architecture="vit_small_patch8_224",
    kwargs={"img_size": 224},
    repository="1aurent/vit_small_patch8_224.lunit_dino",
    revision="c23bc01cfbe022bc1f2a8a9306125a07818e4eb4",
    sha256="0b7e0236ce430064b31485bbb6f85e661dc5eca0cde709e8f04d59f1c2b23e0b",
    dim=384,
    mpps=(0.5, 0.25),
    precision="fp32",
    licence=_LUNIT,
    sources=(_RAW2FEATURES, _SLIDE2VEC),
)
_ROWS = (
    Preset(
        name="uni",
        architecture="vit_large_patch16_224",
        kwargs={"img_size": 224, "init_values": 1e-5},
        repository="MahmoodLab/uni",
        revision="b55a5ec6cade1a39edfe6534189a9b8ca7a022f0",
        file="pytorch_model.bin",
        sha256="56ef09b44a25dc5c7eedc55551b3d47bcd17659a7a33837cf9abc9ec4e2ffb40",
        interpolation="bilinear",
        dim=1024,
        licence=_CC_BY_NC_ND,
        is_gated=True,
        sources=(_TRIDENT, _RAW2FEATURES),
    ),
    Preset(
        name="uni2-h",
        architecture="vit_giant_patch14_224",
        kwargs={
            "img_size": 224,
            "depth": 24,
            "num_heads": 24,
            "init_values": 1e-5,
            "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2,
            "no_embed_class": True,
            "reg_tokens": 8,
            **_SWIGLU,
        },
        repository="MahmoodLab/UNI2-h",
        revision="d517a8dd47902dd7c308b3c36f63bce47e7b9a43",
        file="pytorch_model.bin",
        sha256="6e077eda234bebc595868d918d3458d9dd32a050199b0ff04443b2f46a0a3b1e",
        interpolation="bilinear",
        dim=1536,
        precision="bf16",
        licence=_CC_BY_NC_ND,
        is_gated=True,
        sources=(_TRIDENT, _RAW2FEATURES),
    ),
    _VIRCHOW,
    replace(
        _VIRCHOW,
        name="virchow2",
        kwargs={"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.3375, "reg_tokens": 4, **_SWIGLU},
        repository="paige-ai/Virchow2",
        revision="3158645804b69e3f3bc4439d4116edddf0840a72",
        sha256="8d6cea947eb2418c3b0dff48cfb9b238e47744ab0dfca21b2b0637b140769b4b",
        mpps=_FOUR_SCALES,
        licence=_CC_BY_NC_ND,
    ),
    _H_OPTIMUS_0,
    replace(
        _H_OPTIMUS_0,
        name="h-optimus-1",
        file="model.safetensors",
        repository="bioptimus/H-optimus-1",
        revision="3592cb220dec7a150c5d7813fb56e68bd57473b9",
        sha256="c4f1e5b457ddf00679626053b0bf2899be6a19c3a04ad191c87ad1cdfd1abfe1",
        licence=_CC_BY_NC_ND,
    ),
    Preset(
        name="h0-mini",
        architecture="vit_base_patch14_reg4_dinov2",
        kwargs={"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.33334, **_SWIGLU},
        repository="bioptimus/H0-mini",
        revision="5b5cc0505d19ae558270045eb0df8c34df4d9609",
        sha256="5e4de45a6527a8160f7c21fe3105c987757efe30ce581e1f2cf5809476069ade",
        mean=_BIOPTIMUS_MEAN,
        std=_BIOPTIMUS_STD,
        dim=768,
        licence=_CC_BY_NC_ND,
        is_gated=True,
        sources=(_RAW2FEATURES, _EVA),
    ),
    Preset(
        name="prov-gigapath",
        architecture="vit_giant_patch14_dinov2",
        kwargs={"img_size": 224, "patch_size": 16},
        repository="prov-gigapath/prov-gigapath",
        revision="eba85dd46097c3eedfcc2a3a9a930baecb6bcc19",
        file="pytorch_model.bin",
        sha256="877947214318afa9e011754b74bbc3894a1f480a253afc7bc8045b8321dedd63",
        input_px=256,
        crop_px=224,  # timm's own settings of the hub resize to 224 without a crop; the card and the paper crop
        tile_px=256,
        dim=1536,
        licence=Licence("Apache-2.0, with the card's limits of use", is_commercial=False),
        is_gated=True,
        sources=(_RAW2FEATURES, _SLIDE2VEC, _STAMP),
    ),
    Preset(
        name="phikon",
        architecture="vit_base_patch16_224",
        kwargs={"img_size": 224},
        repository="owkin/phikon",
        revision="057cc0295895c2df3dd7681a89680da6015cbefe",
        sha256="d01642bfeb683c6b039622eca273e0a8e4208065a4595b63edba178c1c4cfa68",
        layout="ViT",
        interpolation="bilinear",
        dim=768,
        precision="fp32",
        licence=_OWKIN,
        sources=(_TRIDENT, _RAW2FEATURES),
    ),
    Preset(
        name="phikon-v2",
        architecture="vit_large_patch16_224",
        kwargs={"img_size": 224, "init_values": 1e-5},
        repository="owkin/phikon-v2",
        revision="2ae989a9c40cffaa27f0a6cb29cc94d1d6f9a5fd",
        sha256="261ae680fa699b3b951597fd57aa19c02ef735805acb104b93af69b36d928569",
        layout="Dinov2",
        dim=1024,
        precision="fp32",
        licence=_OWKIN,
        sources=(_TRIDENT, _RAW2FEATURES),
    ),
    Preset(
        name="midnight-12k",
        architecture="vit_giant_patch14_dinov2",
        kwargs={"img_size": 224},
        repository="kaiko-ai/midnight",
        revision="adc6b15679c981cce6f9b018bbad09d16eeeda9f",
        sha256="52c14f20386ca17c2af8a7bf32c31c352668a8fbf6aefc88d86be6eaa0c72ca1",
        layout="Dinov2",
        mean=_HALF,
        std=_HALF,
        interpolation="bilinear",
        pooling="cls_mean",  # of the card; TRIDENT takes the class token alone
        dim=3072,
        mpps=_FOUR_SCALES,
        licence=_MIT,
        sources=(_RAW2FEATURES, _SLIDE2VEC, _LAZYSLIDE),
    ),
    Preset(
        name="gpfm",
        architecture="vit_large_patch14_dinov2",
        kwargs={"img_size": 224},
        repository="majiabo/GPFM",
        revision="c2e0c6c7cea4d7ae67151c3375d780712f82254e",
        file="GPFM.pth",
        sha256="ebde1a9d7d9098848034bcff30f8771034c8d0b69e32846fa266940f2fd4604c",
        dim=1024,
        precision="fp32",
        licence=Licence("MIT or CC-BY-NC-ND-4.0: the hub and the authors' repository disagree", is_commercial=False),
        sources=(_TRIDENT, _RAW2FEATURES, _LAZYSLIDE),
    ),
    _HIBOU_B,
    replace(
        _HIBOU_B,
        name="hibou-l",
        architecture="vit_large_patch14_reg4_dinov2",
        kwargs={"img_size": 224, "mlp_ratio": 5472 / 1024, **_SWIGLU},
        repository="histai/hibou-L",
        revision="31a3b9fee16554c8552cb643d311733bce8faf7c",
        sha256="a63d1699448143ceccf2b7e1c4bf35b995c51f86ef8a6efb471af2eee210b79c",
        dim=1024,
    ),
    _kaiko("s", 8, 384, "vit_small_patch8_224", "vit_small_patch8_224"),
    _kaiko("s", 16, 384, "vit_small_patch16_224", "vit_small_patch16_224"),
    _kaiko("b", 8, 768, "vit_base_patch8_224", "vit_base_patch8_224"),
    _kaiko("b", 16, 768, "vit_base_patch16_224", "vit_base_patch16_224"),
    _kaiko(
        "l",
        14,
        1024,
        "vit_large_patch14_reg4_dinov2",
        "vit_large_patch14_reg4_224",
        kwargs={"img_size": 224},  # trained at 518
        revision="fb802e347d2c59f05207b70ad75f7df30019c188",
        sha256="149c8b21c60a7115a17572073b09ef142411c91b5194c84a99ebba8b83f20e69",
    ),
    _LUNIT_VITS8,
    replace(
        _LUNIT_VITS8,
        name="lunit-vits16",
        architecture="vit_small_patch16_224",
        repository="1aurent/vit_small_patch16_224.lunit_dino",
        revision="9ed09909d93f9d39a092d8e49717ae48f9b44e6f",
        sha256="a19eb37d6cf038a7e8a34c7e9ec50698d02759b2f49dd799492f6ce7e4cb5937",
        mean=_HALF,
        std=_HALF,
    ),
    Preset(
        name="retccl",
        architecture="resnet50",
        repository="jamesdolezal/RetCCL",
        revision="076c6d18dd11f9ca951c6e294c31a021b42df494",
        file="retccl.pth",
        sha256="931956f31d3f1a3f6047f3172b9e59ee3460d29f7c0c2bb219cbc8e9207795ff",
        input_px=256,
        interpolation="bilinear",
        pooling="map",
        dim=2048,
        mpps=(1.0,),
        tile_px=256,
        precision="fp32",
        licence=_GPL,
        sources=(_RAW2FEATURES, "Xiyue-Wang/RetCCL"),
    ),
    Preset(
        name="ctranspath",  # the authors resize bilinearly, the hub's settings bicubically
        architecture="swin_tiny_patch4_window7_224",
        kwargs={"embed_layer": "ConvStem"},
        repository="1aurent/swin_tiny_patch4_window7_224.CTransPath",
        revision="59c740e4ed91dda4ebe094b64e4cd2e015c31810",
        sha256="158e29683f19cfb0018d040b95610802b640db60d38b00b25ea7db674cd141e4",
        pooling="map",
        dim=768,
        mpps=(1.0, 0.5),  # the authors recommend 1.0 and trained at 0.5
        precision="fp32",
        licence=_GPL,
        sources=(_RAW2FEATURES, _STAMP),
    ),
    Preset(
        name="keep",
        architecture="vit_large_patch16_224",
        kwargs={"img_size": 224, "init_values": 1e-5},
        repository="Astaxanthin/KEEP",
        revision="28a25d95cc6ba27a7e6fab3f144e13dbafd8b21e",
        sha256="82f610d5359aca67b5fd5d841009f26db430ae78d0693743589c0a727b0a146d",
        layout="KEEP",
        projection=768,
        pooling="pooled",
        dim=768,
        mpps=(),
        licence=_MIT,
        sources=(_RAW2FEATURES, _STAMP, _TRIDENT),
    ),
    *(_dinov(2, size, dim) for size, dim in (("s", 384), ("b", 768))),
    _dinov(
        2,
        "l",
        1024,
        revision="4741e1cafbf45415e77074bb0cb42dba76c8684a",
        sha256="0424a5d1b515278cba3c6640ccbeaacc41de59d3a93df0dd5e494285eea2b355",
    ),
    _dinov(2, "g", 1536),
    *(_dinov(3, size, dim) for size, dim in (("s", 384), ("b", 768), ("l", 1024))),
    Preset(
        name="conch",
        architecture="vit_base_patch16_224",
        repository="MahmoodLab/conch",
        layout="other",
        input_px=448,
        dim=512,
        tile_px=448,
        precision="fp32",
        licence=_CC_BY_NC_ND,
        is_gated=True,
        unavailable="it pools by attention in the package conch, which is installed from GitHub",
        sources=(_TRIDENT, _RAW2FEATURES, _SLIDE2VEC),
    ),
    Preset(
        name="conch-v1.5",
        architecture="vit_large_patch16_224",
        repository="MahmoodLab/TITAN",
        layout="other",
        input_px=448,
        dim=768,
        tile_px=512,
        licence=_CC_BY_NC_ND,
        is_gated=True,
        unavailable="it pools by attention, in code that its repository on the hub asks to run",
        sources=(_RAW2FEATURES, _SLIDE2VEC),
    ),
    Preset(
        name="musk",
        architecture="beit3_large_patch16_224",
        repository="xiangjx/musk",
        layout="other",
        input_px=384,
        dim=1024,
        tile_px=384,
        licence=_CC_BY_NC_ND,
        is_gated=True,
        unavailable="it needs fairscale and the package musk, which is installed from GitHub",
        sources=(_TRIDENT, _RAW2FEATURES),
    ),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({row.name: row for row in _ROWS})
