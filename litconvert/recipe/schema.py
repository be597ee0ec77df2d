"""Recipes: the schema."""

import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# The number of the table of defaults, which is in every digest of inputs. Another default for any key needs another
# number, a key that comes or goes needs none: tests/helpers/defaults.json is the table, which a test holds to it.
DEFAULTS = 2

PROJECTIONS = ("q", "k", "v", "o")
STAGES = ("hybrid", "flow_matching")
# Objectives of earlier versions, and why there is none any more.
FORMER_STAGES = {
    "attention_transfer": "`convert` solves the attention now, there is no attention_transfer: leave the stage out"
}
PROMPTS = (
    "a red fox in fresh snow, morning light",
    "a lighthouse on a cliff above a stormy sea, oil painting",
    "a bowl of lemons on a blue table, still life",
    "an old steam train crossing a stone bridge in autumn",
)
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Fraction = Annotated[float, Field(ge=0, le=1)]
SchedulerName = Literal["ddpm", "ddim", "dpm-solver++", "flow-euler"]


class Section(BaseModel):
    """Strict and immutable: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Vae(Section):
    """The image decoder of a latent-space model."""

    path: str
    """Folder or Hub id (`owner/name`, `owner/name@revision`) of a diffusers AutoencoderKL."""
    subfolder: str | None = None
    """Folder inside it."""
    scaling_factor: Annotated[float, Field(gt=0)] | None = None
    """Latents are divided by it before decoding. None: what the VAE's config.json says, which it may not contradict."""
    shift_factor: float | None = None
    """Added to the divided latents before decoding. None: what the VAE's config.json says, or 0."""


class TextEncoder(Section):
    """The T5 that encodes captions, as PixArt's diffusers repositories hold it."""

    path: str
    """Folder or Hub id (`owner/name`, `owner/name@revision`)."""
    subfolder: str | None = "text_encoder"
    """Folder of the encoder inside it."""
    tokenizer: str | None = "tokenizer"
    """Folder of the tokenizer inside it."""


class License(Section):
    """The licence of the source's weights, which the result inherits."""

    id: str = "unknown"
    """A licence id of the Hub, or `other`."""
    name: str | None = None
    """For `other`: its name."""
    link: str | None = None
    """For `other`: where it can be read."""


class Source(Section):
    """The checkpoint to start from, and hints for what its shapes cannot tell."""

    path: str | None = None
    """File, folder, Hub id (`owner/name`, `owner/name@revision`) or `asset:NAME`. A positional SRC replaces it."""
    file: str | None = None
    """The file to read where a folder or repository holds several."""
    family: str | None = None
    """dit, sit, pixart-alpha, pixart-sigma, litconvert or that of a plugin, where recognition should not decide."""
    num_attention_heads: Positive | None = None
    """Heads of softmax attention and of cross-attention, where the width does not tell."""
    sample_size: Positive | None = None
    """Side of the latent, where no position embedding or config tells."""
    num_classes: Positive | None = None
    """Classes, not counting the null class. Default: one row of the class table is the null class."""
    interpolation_scale: Annotated[float, Field(gt=0)] | None = None
    """What PixArt's positions are divided by. Default: that of the released checkpoint of this size."""
    linear_num_heads: Positive | None = None
    """Heads of linear layers in LiT's public layout, where no convolution tells."""
    linear_kernel: Literal["relu", "gelu", "focused"] | None = None
    """Kernel of linear layers in LiT's public layout. Default: relu."""
    linear_eps: Annotated[float, Field(gt=0)] | None = None
    """Eps of linear layers in LiT's public layout. Default: 1e-6."""
    data_timestep: Literal[0, 1] | None = None
    """Of a SiT: the end of [0, 1] where x_t is data. Default: 1, as in SiT's own code; REPA's and others' is 0."""
    timestep_freq_shift: float | None = None
    """0 (default): trained with DiT's code. 1: trained with diffusers'."""
    norm_eps: Annotated[float, Field(gt=0)] | None = None
    """1e-6 (default): trained with DiT's code. 1e-5: trained with diffusers'."""
    license: License = License()
    """Of its weights, which the result inherits."""
    vae: Vae | None = None
    """None: a pixel-space model, values in [-1, 1]."""
    text_encoder: TextEncoder | None = None
    """Of a model of captions; None: captions are given as precomputed embeddings."""


class Scratch(Section):
    """A softmax model that is trained from nothing (`litconvert train`)."""

    sample_size: Positive
    """Side of the latent or image."""
    in_channels: Positive
    """Channels of the latent or image: 4 of Stable Diffusion's VAE, 3 of RGB pixels."""
    hidden_size: Positive
    """Width D of the tokens."""
    num_layers: Positive
    """Transformer blocks."""
    num_attention_heads: Positive
    """Heads of softmax attention and of cross-attention; they divide the width."""
    patch_size: Positive = 2
    """Side of the patch that becomes one token, in latents or pixels."""
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Width of the feed-forward layers over that of the tokens."""
    num_classes: Positive | None = None
    """Of a model of classes; one more, the null class, is added."""
    caption_channels: Positive | None = None
    """Of a model of captions: the width of its text features."""
    caption_tokens: NonNegative = 0
    """Of a model of captions: the longest caption."""
    prediction: Literal["noise", "velocity"] = "noise"
    """What it predicts: noise, with a variance (DiT), or velocity (SiT)."""


class Student(Section):
    """What the linear model looks like."""

    num_attention_heads: Positive = 4
    """Heads of the linear layers."""
    kernel: Literal["relu", "gelu", "focused"] = "relu"
    """What makes queries and keys positive: relu (the paper's), gelu, or focused (FLatten's)."""
    conv_size: Literal[0, 3, 5, 7] = 5
    """Side of the depth-wise convolution on V; 0: none."""
    eps: Annotated[float, Field(gt=0)] = 1e-6
    """Added by the kernel, and to the denominator of linear attention."""
    softmax_layers: tuple[NonNegative, ...] = ()
    """Layers that keep softmax attention, counted from 0."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of the written weights; None: the source's."""
    max_shard_bytes: Positive = 10_000_000_000
    """Weights are written in files of at most so many bytes."""


Combination = Annotated[str, Field(pattern=r"^(none|all|[qkvo](\s*[+,]\s*[qkvo])*)$")]


def _projections(value: Any) -> Any:
    """`none`, `all`, `q`, `k+v`, `[q, k]` to a tuple in the order q, k, v, o."""
    if isinstance(value, str):
        value = {"none": [], "all": list(PROJECTIONS)}.get(value, re.split(r"\s*[+,]\s*", value))
    if not isinstance(value, (list, tuple)) or any(name not in PROJECTIONS for name in value):
        raise ValueError("must be none, all, or a combination of q, k, v and o, such as k+v")
    return tuple(name for name in PROJECTIONS if name in value)


class Inherit(Section):
    """What the student takes over."""

    weights: str = "auto"
    """Of a file of several sets: ema, model, or a set's name there. auto: EMA if present, else the only set."""
    attention: Annotated[
        tuple[Literal["q", "k", "v", "o"], ...],
        BeforeValidator(_projections, json_schema_input_type=Combination | list[Literal["q", "k", "v", "o"]]),
    ] = ()
    """Attention projections to inherit: none | all | any combination of q, k, v, o."""


class Solve(Section):
    """The solved start: `convert` finds the fresh attention layer by layer, before any training."""

    data: str | None = None
    """Data set whose images the calibration states are made of; None: the teacher draws some."""
    embeddings: str | None = None
    """Of a model of captions without `data`: encoded captions to draw for, a file of `sample --save-embeddings`. None:
    the model's own null caption."""
    states: Positive | None = None
    """Calibration states: noisy images with a timestep and a condition. None: by device and size."""
    states_per_image: Positive | None = None
    """States that one clean image makes. None: by device and size."""
    timestep_power: Annotated[float, Field(gt=0)] = 1.0
    """Of the states' places between image and noise, u^power with u uniform; above 1 more of them are near images."""
    drawing_steps: Positive = 8
    """Steps in which the teacher draws the images."""
    local_steps: NonNegative | None = None
    """Gradient steps on each layer's attention alone, between two closed forms. None: by device and size."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Of the local steps, which follow a cosine to 0. None: 1e-3 where V is inherited, 2e-3 where it starts fresh."""
    local_batch_size: Positive = 32
    """States in a local step."""
    walks: Positive = 1
    """How often the layers are gone through, each time on other noise."""
    ridge: Annotated[float, Field(gt=0)] = 1e-4
    """Of the output projection, times the mean of the diagonal of its normal equations."""
    convolution_ridge: Annotated[float, Field(gt=0)] = 1e-3
    """Of the convolution, likewise."""
    held_out: Positive | None = None
    """States that nothing is solved for, on which errors are measured. None: by device and size."""
    batch_size: Positive = 32
    """States at a time in forward passes; it changes rounding alone."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Of forward passes; auto: bf16 where the device computes it in hardware. Sums are float64."""


class Guidance(Section):
    """How samples are drawn."""

    scheduler: SchedulerName = "ddim"
    """flow-euler for a model that predicts velocity (SiT), one of the others for a model that predicts noise."""
    steps: Positive = 25
    """Of the scheduler."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """Classifier-free guidance scale; 1: none."""
    guidance_channels: Positive | None = None
    """Guide the first so many channels only (DiT's protocol: 3); None: all."""


class Synthesize(Guidance):
    """The training set that the teacher draws."""

    num_samples: Positive = 10_000
    """Samples in all."""
    batch_size: Positive = 64
    """Samples at a time; it changes rounding alone."""
    shard_size: Positive = 1_000
    """Samples a shard; a resumed run loses at most one."""
    seed: Seed = 1
    """Of noise and labels. Apart from the evaluation's seeds, so that the two share no noise."""
    prompts: str | None = None
    """Of a model of captions: a text file, one prompt a line, cycled; None: the list that ships with litconvert."""


ClassOrder = Literal["name", "number"]


class Encode(Section):
    """The training set that `litconvert latents encode` makes of images."""

    split: str = "train"
    """Of a data set that has several."""
    image_column: str = "image"
    """Images of a table or a Hub data set, and the file extension of webdataset shards."""
    label_column: str = "label"
    """Class labels, likewise (`cls` where this is not found in shards)."""
    caption_column: str = "caption"
    """Captions, likewise (`txt` where this is not found in shards)."""
    class_order: ClassOrder | None = None
    """How folders called by numbers are sorted, which gives their labels: `name` as text (0, 1, 10, 2), as torchvision
    and so DiT's own training does, `number` by the numbers. None: either, where both are the same, or else refused."""
    max_pixels: Positive = 178_956_970
    """An image of more, which may take gigabytes of memory to read, counts as broken."""
    sizes: tuple[tuple[Positive, Positive], ...] = ()
    """Heights and widths in pixels; each image goes to the nearest aspect ratio. Empty: the model's own square."""
    captions: Literal["embeddings", "text"] = "embeddings"
    """Of a model of captions: store T5's features, or the text alone, which training then encodes on the fly."""
    num_samples: Positive | None = None
    """The first so many images; None: all."""
    batch_size: Positive = 16
    """Images at a time; it changes rounding alone."""
    shard_size: Positive = 1_000
    """Images a shard; a resumed run loses at most one."""


class Data(Section):
    """The training set: a directory written by `litconvert latents`, or drawn by the teacher."""

    path: str | None = None
    """None: the teacher draws it, as `synthesize` says."""
    flip: bool = False
    """Mirror half of the samples, drawn anew at each visit. Encoding stores the mirrored latents for it."""
    workers: NonNegative = 0
    """Processes that read ahead; 0: read between the steps."""
    synthesize: Synthesize = Synthesize()
    """How the teacher draws it."""
    encode: Encode = Encode()
    """How it is made of images."""


class Diffusion(Section):
    """The forward process the source was trained with."""

    num_timesteps: Positive = 1000
    """Linear betas, 1e-4 to 0.02 at 1000 timesteps (scaled by 1000 / num_timesteps otherwise)."""


class Stage(Section):
    """What all kinds of stage share: the length, the schedule and what is trained."""

    steps: Positive
    """Optimiser steps."""
    batch_size: Positive = 256
    """Samples a step, over all processes and accumulation."""
    optimizer: Literal["adamw", "adamw-8bit", "came"] = "adamw"
    """adamw-8bit needs bitsandbytes, came (PixArt's) needs came-pytorch."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Of fresh tensors, and of all others that are given no rate of their own."""
    inherited_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Of tensors that were inherited from the source; None: learning_rate, as for fresh ones."""
    solved_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Of tensors that `convert` solved; None: learning_rate, as for fresh ones."""
    frozen: tuple[str, ...] = ()
    """Tensors that are not trained, as patterns of their names: `blocks.*.ff.*`."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Of the learning rate after the warm-up: as it is, or to 0 along a cosine or a line."""
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of AdamW and CAME, decoupled from the gradient."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of the optimiser's two moving averages."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """The gradient is scaled down to this norm; None: never."""
    ema_decay: Fraction = 0.9999
    """The EMA starts from the stage's first weights, with decay min(ema_decay, (1 + s) / (10 + s)) at step s."""
    condition_dropout: Fraction = 0.1
    """Share of samples whose condition is dropped, for student and teacher alike."""
    stratified_timesteps: bool = False
    """One timestep in each of batch_size equal parts of all timesteps, in place of independent ones: the loss changes
    less from step to step (Kingma et al., arXiv 2107.00630, appendix I.1)."""
    feature_weight: Annotated[float, Field(ge=0)] = 0.0
    """Of the attention outputs of linear layers against the teacher's (0.5 in LinFusion and CLEAR)."""


class Hybrid(Stage):
    """The paper's loss: DDPM plus the teacher's noise and variance. With both weights 0, DDPM alone."""

    objective: Literal["hybrid"]
    """The paper's loss, of a model that predicts noise."""
    variational_bound: bool = True
    """Train the variance with the variational bound too, as DiT does."""
    noise_weight: Annotated[float, Field(ge=0)] = 0.5
    """Of the noise term (lambda1 in the paper)."""
    variance_weight: Annotated[float, Field(ge=0)] = 0.05
    """Of the variance term (lambda2 in the paper)."""
    snr_power: Annotated[float, Field(ge=0, le=1)] = 0.0
    """A sample counts SNR(t)^-snr_power times. With 0, the paper's, errors of the noise count alike at all timesteps,
    and those near clean images are by far the largest; with 1 errors of the clean image count alike."""


class FlowMatchingStage(Stage):
    """SiT's loss, on the velocity, plus the teacher's velocity. With weight 0, flow matching alone."""

    objective: Literal["flow_matching"]
    """SiT's loss, of a model that predicts velocity."""
    velocity_weight: Annotated[float, Field(ge=0)] = 0.5
    """Of the teacher's velocity."""


AnyStage = Hybrid | FlowMatchingStage


def _share(value: Any) -> Any:
    """A recipe's yes or no as all or nothing."""
    return float(value) if isinstance(value, bool) else value


class Start(Section):
    """The run whose weights a run starts from."""

    path: str | None = None
    """RUN, for its finished model or latest checkpoint, or RUN@STEP for the checkpoint of a step; `--from` sets it."""
    weights: Literal["ema", "model"] = "ema"
    """The moving average, or the raw weights as that run would have gone on from them."""


class Distill(Section):
    """The stages, and how they run."""

    teacher: Source | None = None
    """Another teacher than the source, say a larger one; None: the source."""
    start: Start | None = None
    """Start from another run's weights, with a new optimiser; None: from the student as it was converted."""
    stages: tuple[Annotated[AnyStage, Field(discriminator="objective")], ...] = ()
    """Trained one after another."""
    gradient_accumulation_steps: Positive = 1
    """Parts a step is computed in: the same mathematics in less memory."""
    gradient_checkpointing: Annotated[Fraction, BeforeValidator(_share)] = 0.0
    """Share of the student's blocks whose activations are computed again rather than kept; true: all."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """auto: bf16 autocast where the device computes it in hardware."""
    compile: Literal["auto", "no", "blocks"] = "auto"
    """torch.compile of the teacher's and the student's blocks; auto: on a GPU."""
    teacher_placement: Literal["device", "sharded", "offloaded"] = "device"
    """Where the teacher's weights are: on each device, split over the processes, or in main memory, moved by layer."""
    noise_set: Positive | None = None
    """Each sample meets so many noises and timesteps in turn, so that the teacher's outputs are kept on disk and
    computed once; None: noise is always new and the teacher always computes."""
    max_skipped_steps: NonNegative = 0
    """Steps of the run that may be left out because a loss or gradient is NaN or infinite; one more, and it stops."""
    checkpoint_every: Positive = 1000
    """Steps between checkpoints."""
    keep_checkpoints: Positive = 2
    """How many checkpoints stay; older ones are removed."""
    sample_every: Positive | None = None
    """Draw samples, and measure the error by timestep, every so many steps; None: at the end only."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where the metrics go besides metrics.csv; each is a package of its name."""


class Sample(Guidance):
    """The pictures that are drawn."""

    num_images: Positive | None = None
    """Classes or prompts are cycled to so many. None: 40 of a model of classes, one for each prompt."""
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = PROMPTS
    """Of a model of captions."""
    negative_prompt: str | None = None
    """What guidance leads away from. None: the model's own null caption where it has one, else the empty prompt."""
    seed: Seed = 0
    """Of the noise."""
    batch_size: Positive = 64
    """Samples at a time; it changes rounding alone."""


class Sampling(Section):
    """How whatever draws computes: `sample`, `latents synthesize`, `evaluate`, and the pictures of a run."""

    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Of the model's forward passes; auto: bf16 where the device computes it in hardware, and float32 elsewhere. The
    sampler's own arithmetic is float32."""
    compile: Literal["auto", "no", "blocks"] = "auto"
    """torch.compile of the model's blocks; auto: on a GPU, where 1,000 forward passes or more are to be made."""
    shard_size: Positive = 500
    """Pictures that are drawn before they are kept; an interrupted command loses at most one such part."""


class Evaluate(Guidance):
    """The metrics, against the teacher's own samples."""

    features: Literal["digits"] | None = None
    """The classifier whose features and verdicts are used; None: no metrics are known for this data."""
    num_samples: Positive = 1000
    """Samples for each seed."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (100, 101, 102)
    """One evaluation each; the mean and the spread are reported."""
    reference_seed: Seed = 99
    """Of the teacher's reference samples; never one of `seeds`."""
    batch_size: Positive = 250
    """Samples at a time; it changes rounding alone."""

    @model_validator(mode="after")
    def _independent(self) -> "Evaluate":
        if self.reference_seed in self.seeds:
            raise ValueError(f"reference_seed {self.reference_seed} is one of seeds: reference and samples share noise")
        return self


class Publish(Section):
    """Where `run` pushes the result."""

    repo_id: str | None = None
    """Hub repository, owner/name; None: `run` pushes nothing."""
    private: bool = False
    """Create the repository as a private one."""
    pipeline: bool = False
    """Lay out a full diffusers pipeline."""
    backup_every: Annotated[float, Field(gt=0)] | None = None
    """Minutes between uploads of the run directory, checkpoints left out, to `repo_id` while it trains."""


# What is a number, as editors read YAML 1.2.
NUMBER = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would read as something else than a string."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


class Recipe(Section):
    """Everything one conversion needs, in the order of the line."""

    seed: Seed = 0
    """Of fresh weights and of every draw in distillation."""
    scratch: Scratch | None = None
    """Only of a recipe for `litconvert train`, which then takes the place of source, student and inherit."""
    source: Source = Source()
    """The checkpoint to start from."""
    diffusion: Diffusion = Diffusion()
    """The forward process that it was trained with."""
    student: Student = Student()
    """The linear model."""
    inherit: Inherit = Inherit()
    """What the student takes over from the source."""
    solve: Solve | None = Solve()
    """None: what is fresh starts at random (`convert --no-solve`)."""
    data: Data = Data()
    """The training set."""
    distill: Distill = Distill()
    """The training."""
    sampling: Sampling = Sampling()
    """How whatever draws computes."""
    sample: Sample = Sample()
    """The pictures that `sample` and a run draw."""
    evaluate: Evaluate = Evaluate()
    """The metrics."""
    publish: Publish = Publish()
    """Where the result is pushed to."""

    def to_yaml(self) -> str:
        """Every key resolved."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def teacher_weights(stage: AnyStage) -> tuple[float, ...]:
    """The weights of what a stage asks its teacher for."""
    if isinstance(stage, FlowMatchingStage):
        return (stage.velocity_weight, stage.feature_weight)
    return (stage.noise_weight, stage.variance_weight, stage.feature_weight)
