"""The fixed system prompts that the published models were trained with; they must not change by a character."""

THINK_BEFORE_IMAGE = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, "
    "i.e. <think> planning process here </think> image here"
)

THINK_BEFORE_ANSWER = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, "
    "i.e. <think> reasoning process here </think> answer here"
)

THINK_INTERLEAVED = (  # ThinkMorph's
    "\nLet's think step by step to answer the question. For text-based thinking, enclose the process within "
    "<think> </think>, e.g. <think> thinking process here </think>. For visual thinking, enclose the content within "
    "<image_start> </image_end>, e.g. <image_start> thinking image here </image_end>. Finally conclude with the final "
    "answer wrapped in <answer></answer> tags, i.e.<answer> answer here </answer>.\n"
)

IMAGE_REQUEST = "<image_start>"  # what an interleaving model writes when it wants to draw
