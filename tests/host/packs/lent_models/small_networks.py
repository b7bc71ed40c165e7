"""The sizes of networks that the host recognizes only with the pack of this folder."""

Z_IMAGE = {
    "patch_size": 2,
    "in_channels": 16,
    "qk_norm": True,
    "dim": 256,
    "cap_feat_dim": 64,
    "n_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 2,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8 / 3,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
QWEN_IMAGE = {"in_channels": 64, "num_layers": 3, "num_attention_heads": 1, "joint_attention_dim": 64}
