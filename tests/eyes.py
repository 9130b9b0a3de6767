"""A vision-language model to look with: the real classes, tiny random weights."""

import pytest
import torch


def build(folder, *words):
    """A LLaVA in a folder.

    Args:
        folder: Where it is written.
        *words: What its tokenizer knows as one token each.
    """
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    from safelight.models.tiny import clip_tokenizer

    tokenizer = clip_tokenizer(4000)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_tokens(list(words))
    end = tokenizer.eos_token_id
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=end,
            pad_token_id=end,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    net = LlavaForConditionalGeneration(config)
    net.generation_config.eos_token_id = end
    net.generation_config.pad_token_id = end
    net.save_pretrained(folder)
    size = {"shortest_edge": 16}
    processor = LlavaProcessor(
        image_processor=module.CLIPImageProcessorPil(
            size=size, crop_size={"height": 16, "width": 16}
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for m in messages %}{% for c in m['content'] %}"
            "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %}"
        ),
    )
    processor.save_pretrained(folder)
    return str(folder)
