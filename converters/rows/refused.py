"""Why a class of keras.layers or torch.nn has no row."""

_TWO = "it takes two inputs or more"
_LOSS = "a loss is no layer of a model"
_TEXT = "it takes or gives text, or looks it up in a vocabulary"
_BASE = "it is a base class, not a layer"
_CELL = "a cell is one step of a recurrent layer: use the layer"

KERAS = {
    **dict.fromkeys(
        ["HashedCrossing", "Hashing", "IntegerLookup", "StringLookup", "TextVectorization"], _TEXT
    ),
    **dict.fromkeys(["Layer", "Wrapper", "InputSpec", "Pipeline"], _BASE),
    **dict.fromkeys(["SimpleRNNCell", "LSTMCell", "GRUCell", "StackedRNNCells"], _CELL),
    **dict.fromkeys(
        ["Lambda", "JaxLayer", "FlaxLayer", "TorchModuleWrapper", "TFSMLayer"],
        "it runs any code, which no file or framework can say: write it with keras.ops, or as a "
        "layer of your own for converters.register; converters.transform(model, t) changes the "
        "model's weights as it is",
    ),
    **dict.fromkeys(
        ["MelSpectrogram", "STFTSpectrogram"], "it transforms signals, which others have not"
    ),
    **dict.fromkeys(
        [
            "AutoContrast",
            "ContrastLimitedAdaptiveHistogramEqualization",
            "Equalization",
            "Solarization",
            "MaxNumBoundingBoxes",
        ],
        "it changes images at inference too, in a way that others have not",
    ),
    "RandomCrop": "at inference it resizes and crops by rules of its own",
}
TORCH = {
    **dict.fromkeys(
        (
            "BCELoss",
            "BCEWithLogitsLoss",
            "CTCLoss",
            "CosineEmbeddingLoss",
            "CrossEntropyLoss",
            "GaussianNLLLoss",
            "HingeEmbeddingLoss",
            "HuberLoss",
            "KLDivLoss",
            "L1Loss",
            "LinearCrossEntropyLoss",
            "MSELoss",
            "MarginRankingLoss",
            "MultiLabelMarginLoss",
            "MultiLabelSoftMarginLoss",
            "MultiMarginLoss",
            "NLLLoss",
            "NLLLoss2d",
            "PoissonNLLLoss",
            "SmoothL1Loss",
            "SoftMarginLoss",
            "TripletMarginLoss",
            "TripletMarginWithDistanceLoss",
            "AdaptiveLogSoftmaxWithLoss",
        ),
        _LOSS,
    ),
    **dict.fromkeys(
        [
            "MaxUnpool1d",
            "MaxUnpool2d",
            "MaxUnpool3d",
        ],
        _TWO,
    ),
    **dict.fromkeys(["RNNCell", "LSTMCell", "GRUCell"], _CELL),
    **dict.fromkeys(
        [
            "Module",
            "Container",
            "RNNBase",
            "RNNCellBase",
            "ParameterDict",
            "ParameterList",
            "Buffer",
            "ModuleDict",
            "UninitializedBuffer",
            "UninitializedParameter",
            "LinearCrossEntropyOptions",
        ],
        _BASE,
    ),
    **dict.fromkeys(
        ["FractionalMaxPool2d", "FractionalMaxPool3d"], "it draws its windows at inference too"
    ),
    **dict.fromkeys(["Fold", "Unfold"], "neither Keras nor Flax has such a layer"),
    "Select": "it must follow an RNN, LSTM or GRU",
    "EmbeddingBag": "it takes offsets beside its input",
    "CrossMapLRN2d": "an old form of LocalResponseNorm: use that",
    "DataParallel": "it is no layer: give the module inside it, model.module",
}
# Of torch, in a Sequential.
WITHIN = dict.fromkeys(
    [
        *("Bilinear", "CosineSimilarity", "PairwiseDistance"),
        *("Transformer", "TransformerDecoder", "TransformerDecoderLayer"),
    ],
    "it takes two inputs, of which a Sequential gives it one; in a module whose forward gives it "
    "both it converts",
)
