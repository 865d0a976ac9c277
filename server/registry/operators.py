"""What a graph may be made of: the bounds of a pushed model and the operators that it may use.

Data alone, read by the gate and by the page on the bundle format. An operator that is not here is refused; one is added
when somebody needs it, if it is deterministic, maps numbers to numbers and holds no graph of its own.
"""

from __future__ import annotations

from typing import Final

NODES_MAX: Final = 10_000
INITIALIZERS_MAX: Final = 1_000
IR_VERSION_MAX: Final = 10
OPSETS_MAX: Final = {"": 22, "ai.onnx.ml": 5}  # what the oldest onnxruntime we support runs for certain

# By domain; "" is ONNX's own.
OPERATORS: Final = {
    "": frozenset(
        """
        Abs Add And Cast Ceil Celu Clip Cos Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid
        HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow
        Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum Tanh ThresholdedRelu Where Xor
        Einsum Gemm MatMul
        ArgMax ArgMin CumSum LogSoftmax ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
        ReduceProd ReduceSum ReduceSumSquare Softmax TopK
        BatchNormalization LayerNormalization
        Concat Constant ConstantOfShape Expand Flatten Gather GatherElements GatherND OneHot Pad Range Reshape Shape
        Size Slice Split Squeeze Tile Transpose Unsqueeze
        """.split()
    ),
    "ai.onnx.ml": frozenset(
        """
        ArrayFeatureExtractor LinearClassifier LinearRegressor Normalizer Scaler TreeEnsemble TreeEnsembleClassifier
        TreeEnsembleRegressor
        """.split()
    ),
}
