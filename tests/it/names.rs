//! What other programs call the tensors, from the official names: the way back from `model::weights::layout`, written apart
//! from it. Sources as there.

fn replaced(name: &str, table: &[(&str, &str)]) -> String {
    table.iter().fold(name.to_string(), |name, (from, to)| name.replace(from, to))
}

/// Diffusers' names of the transformer, as far as the base family has them.
pub(crate) fn diffusers_transformer(name: &str) -> String {
    if name == "head.modulation" {
        return "scale_shift_table".into();
    }
    let mut k = replaced(
        name,
        &[
            (".modulation", ".scale_shift_table"),
            ("head.head.", "proj_out."),
            (".norm3.", ".norm2."),
            ("ffn.0.", "ffn.net.0.proj."),
            ("ffn.2.", "ffn.net.2."),
            ("time_projection.1.", "condition_embedder.time_proj."),
        ],
    );
    for (n, m) in [(0, 1), (2, 2)] {
        for kind in ["time", "text"] {
            let to = format!("condition_embedder.{kind}_embedder.linear_{m}.");
            k = k.replace(&format!("{kind}_embedding.{n}."), &to);
        }
    }
    for (from, to) in [("self_attn", "attn1"), ("cross_attn", "attn2")] {
        for p in ["q", "k", "v"] {
            k = k.replace(&format!("{from}.{p}."), &format!("{to}.to_{p}."));
        }
        k = k.replace(&format!("{from}.o."), &format!("{to}.to_out.0.")).replace(from, to);
    }
    k
}

fn residual(name: &str) -> String {
    replaced(
        name,
        &[
            ("residual.0.", "norm1."),
            ("residual.2.", "conv1."),
            ("residual.3.", "norm2."),
            ("residual.6.", "conv2."),
            ("shortcut.", "conv_shortcut."),
        ],
    )
}

/// What both autoencoders have in common.
fn ends(name: &str) -> Option<String> {
    for (from, to) in [("conv1.", "quant_conv."), ("conv2.", "post_quant_conv.")] {
        if let Some(rest) = name.strip_prefix(from) {
            return Some(format!("{to}{rest}"));
        }
    }
    let (side, rest) = name.split_once('.')?;
    for (from, to) in [("conv1.", "conv_in."), ("head.0.", "norm_out."), ("head.2.", "conv_out.")] {
        if let Some(rest) = rest.strip_prefix(from) {
            return Some(format!("{side}.{to}{rest}"));
        }
    }
    for (from, to) in [("middle.0.", "resnets.0"), ("middle.1.", "attentions.0"), ("middle.2.", "resnets.1")] {
        if let Some(rest) = rest.strip_prefix(from) {
            return Some(format!("{side}.mid_block.{to}.{}", residual(rest)));
        }
    }
    None
}

pub(crate) fn diffusers_vae21(name: &str) -> String {
    if let Some(k) = ends(name) {
        return k;
    }
    let p: Vec<&str> = name.splitn(4, '.').collect();
    let n: usize = p[2].parse().unwrap();
    match p[1] {
        "downsamples" => format!("encoder.down_blocks.{n}.{}", residual(p[3])),
        _ if n % 4 == 3 => format!("decoder.up_blocks.{}.upsamplers.0.{}", n / 4, p[3]),
        _ => format!("decoder.up_blocks.{}.resnets.{}.{}", n / 4, n % 4, residual(p[3])),
    }
}

pub(crate) fn diffusers_vae22(name: &str) -> String {
    if let Some(k) = ends(name) {
        return k;
    }
    let p: Vec<&str> = name.splitn(6, '.').collect();
    let last: usize = p[4].parse().unwrap();
    match p[1] {
        "downsamples" if last == 2 => format!("encoder.down_blocks.{}.downsampler.{}", p[2], p[5]),
        "downsamples" => format!("encoder.down_blocks.{}.resnets.{last}.{}", p[2], residual(p[5])),
        _ if last == 3 => format!("decoder.up_blocks.{}.upsampler.{}", p[2], p[5]),
        _ => format!("decoder.up_blocks.{}.resnets.{last}.{}", p[2], residual(p[5])),
    }
}

/// The text encoder as Transformers and ComfyUI have it.
pub(crate) fn transformers_text(name: &str) -> String {
    if name == "norm.weight" {
        return "encoder.final_layer_norm.weight".into();
    }
    replaced(
        name,
        &[
            ("token_embedding.", "shared."),
            (".norm1.", ".layer.0.layer_norm."),
            (".norm2.", ".layer.1.layer_norm."),
            (".attn.", ".layer.0.SelfAttention."),
            (".pos_embedding.embedding.", ".layer.0.SelfAttention.relative_attention_bias."),
            (".ffn.gate.0.", ".layer.1.DenseReluDense.wi_0."),
            (".ffn.fc1.", ".layer.1.DenseReluDense.wi_1."),
            (".ffn.fc2.", ".layer.1.DenseReluDense.wo."),
            ("blocks.", "encoder.block."),
        ],
    )
}

/// And as llama.cpp has it.
pub(crate) fn llama_text(name: &str) -> String {
    if name == "norm.weight" {
        return "enc.output_norm.weight".into();
    }
    replaced(
        name,
        &[
            ("token_embedding.", "token_embd."),
            (".norm1.", ".attn_norm."),
            (".norm2.", ".ffn_norm."),
            (".attn.", ".attn_"),
            (".pos_embedding.embedding.", ".attn_rel_b."),
            (".ffn.gate.0.", ".ffn_gate."),
            (".ffn.fc1.", ".ffn_up."),
            (".ffn.fc2.", ".ffn_down."),
            ("blocks.", "enc.blk."),
        ],
    )
}
