//! The base family's parts on disk: which transformer is for which noise, and one of them in memory at a time.

use std::{path::Path, sync::Arc};

use candle_core::{DType, Device, Tensor};

use super::{Expert, Experts};
use crate::{
    avatar::{
        AvatarError, Result,
        s2v::{
            Config, Watcher,
            parts::{self, Found, Text, fits},
        },
    },
    model::{
        self, Error,
        dit::{self, Dit},
        weights::{
            Adapted, Checkpoint, Source, Survey,
            layout::Part,
            synth::{self, Whole},
        },
    },
};

/// Everything a model of the base family is made of, opened but not loaded.
pub(super) struct Parts {
    /// For all noise, or for low noise and high noise.
    pub(super) transformers: Vec<Arc<dyn Source>>,
    pub(super) config: dit::Config,
    pub(super) vae: Arc<dyn Source>,
    pub(super) text: Text,
}

/// For which noise a file is, by the names of its folder and itself, which is all that tells the two apart: `high_noise`
/// and `low_noise` in one spelling or another (the official folders, ComfyUI, GGUF), `transformer` and `transformer_2`
/// (Diffusers).
fn noise(path: &Path) -> Option<bool> {
    let folder = path.parent().and_then(Path::file_name).map(|f| f.to_string_lossy().to_ascii_lowercase());
    let file = path.file_name().map(|f| f.to_string_lossy().to_ascii_lowercase());
    let joined = |s: &str| s.replace(['-', '_', ' ', '.'], "");
    for name in [file, folder.clone()].iter().flatten() {
        let (high, low) = (joined(name).contains("highnoise"), joined(name).contains("lownoise"));
        if high != low {
            return Some(high);
        }
    }
    match folder.as_deref() {
        Some("transformer") => Some(true),
        Some("transformer_2") => Some(false),
        _ => None,
    }
}

impl Parts {
    pub(super) fn find(config: &Config) -> Result<Parts> {
        let (mut found, names) = match Found::of(config)? {
            Found::Random(whole, seed) => (Parts::random(whole, seed).map_err(fits)?, vec![None; 2]),
            Found::OnDisk(paths) => Parts::on_disk(&paths)?,
        };
        let adapters = parts::adapters(config)?;
        for (i, transformer) in found.transformers.iter_mut().enumerate() {
            // An adapter whose name says for which noise it is belongs to that expert alone.
            let own = |path: &str| match (noise(Path::new(path)), names.get(i).copied().flatten()) {
                (Some(of), Some(high)) => of == high,
                _ => true,
            };
            let mine: Vec<_> = (config.loras.iter().zip(&adapters))
                .filter(|(text, _)| own(text.rsplit_once(':').map_or(text.as_str(), |(path, _)| path)))
                .map(|(_, (source, weight))| (source.clone(), *weight))
                .collect();
            if !mine.is_empty() {
                *transformer = Arc::new(Adapted::new(transformer.clone(), mine).map_err(fits)?);
            }
        }
        Ok(found)
    }

    fn random(whole: &Whole, seed: u64) -> model::Result<Parts> {
        let part = |preset: &str, seed| synth::imagined(synth::preset(preset)?, seed);
        // As they lie in a folder, high noise first; here low noise comes first.
        let transformers = (0..whole.folders.len() as u64).rev().map(|i| part(whole.transformer, seed + i));
        Ok(Parts {
            transformers: transformers.collect::<model::Result<_>>()?,
            config: whole.transformer_config(),
            vae: part(whole.vae, seed)?,
            text: Text::random(whole, seed)?,
        })
    }

    /// The parts, and for which noise each transformer is, as far as its name tells.
    fn on_disk(paths: &[std::path::PathBuf]) -> Result<(Parts, Vec<Option<bool>>)> {
        let survey = Survey::of(paths).map_err(fits)?;
        let incomplete = |what: String| parts::unusable(paths, &what);
        let all: Vec<&Checkpoint> = survey.found.iter().filter(|c| c.part == Part::Base).collect();
        let named = |c: &Checkpoint| c.files.first().and_then(|f| noise(f));
        let of = |high| all.iter().copied().find(|c| named(c) == Some(high));
        let chosen: Vec<&Checkpoint> = match (of(false), of(true), all.as_slice()) {
            (Some(low), Some(high), _) => vec![low, high],
            // Diffusers calls the only transformer of a model by the same name as the first of two.
            (None, None, [one]) => vec![one],
            (None, Some(one), [_])
                if one.files.first().is_some_and(|f| f.parent().is_some_and(|p| p.ends_with("transformer"))) =>
            {
                vec![one]
            }
            (low, high, [_]) if low.is_some() || high.is_some() => {
                let absent = if low.is_some() { "high" } else { "low" };
                return Err(incomplete(format!(
                    "the transformer for {absent} noise is absent: name its file or folder with --checkpoint, too; it is \
                     published at {}",
                    Part::Base.published()
                )));
            }
            _ => {
                let files: Vec<_> = all.iter().filter_map(|c| Some(c.files.first()?.display().to_string())).collect();
                return Err(incomplete(format!(
                    "there are {} transformers, and their names do not say which is for high_noise and which for \
                     low_noise: {}",
                    all.len(),
                    files.join(", ")
                )));
            }
        };
        let config = parts::transformer_config(chosen[0]).map_err(|e| incomplete(e.to_string()))?;
        let vae = if config.out_dim == 48 { Part::Vae22 } else { Part::Vae21 };
        if let Some(lack) = survey.lack(&[Part::Base, vae, Part::Text], true) {
            return Err(incomplete(lack));
        }
        let found = |part: Part| survey.part(part).ok_or_else(|| incomplete(format!("no {}", part.name())));
        let (vae, encoder) = (found(vae)?, found(Part::Text)?);
        let text = Text::of(&survey, encoder);
        let mut wrong = text.complaints(encoder, &config);
        for c in &chosen {
            if c.source.names().iter().any(|n| n.starts_with("img_emb.")) {
                wrong.push(format!(
                    "{} is of Wan 2.1's image-to-video, which sees its picture through CLIP as well; Wan 2.2's is run",
                    c.source.origin()
                ));
            }
            wrong.extend(parts::misfit(c, &|w| Dit::load(config.clone(), w).map(drop)));
        }
        wrong.extend(parts::misfit(vae, &parts::both_ways));
        if !wrong.is_empty() {
            return Err(incomplete(wrong.join("\n  ")));
        }
        let transformers = chosen.iter().map(|c| c.source.clone()).collect();
        let names = chosen.iter().map(|c| named(c)).collect();
        Ok((Parts { transformers, config, vae: vae.source.clone(), text }, names))
    }
}

/// The transformers of one model, loaded when they are asked; of two, the other one goes first.
pub(super) struct OnDisk {
    transformers: Vec<Arc<dyn Source>>,
    config: dit::Config,
    settings: Config,
    device: Device,
    dtype: DType,
    watcher: Watcher,
    loaded: Option<(usize, Arc<Dit>)>,
}

impl OnDisk {
    pub(super) fn new(parts: &Parts, settings: &Config, device: &Device, dtype: DType, watcher: &Watcher) -> OnDisk {
        OnDisk {
            transformers: parts.transformers.clone(),
            config: parts.config.clone(),
            settings: settings.clone(),
            device: device.clone(),
            dtype,
            watcher: watcher.clone(),
            loaded: None,
        }
    }

    fn load(&mut self, high: bool) -> model::Result<Arc<Dit>> {
        let which = usize::from(high).min(self.transformers.len().saturating_sub(1));
        if let Some((loaded, dit)) = &self.loaded
            && *loaded == which
        {
            return Ok(dit.clone());
        }
        self.loaded = None;
        let source = self.transformers.get(which).ok_or_else(|| Error::Config("there is no transformer".into()))?;
        let (config, settings) = (self.config.clone(), &self.settings);
        let dit = parts::transformer(source, config, settings, &self.device, self.dtype, &self.watcher)?;
        Ok(self.loaded.insert((which, Arc::new(dit))).1.clone())
    }
}

/// Experts on disk that were told a prompt.
pub(super) struct Told<'a> {
    pub(super) experts: &'a mut OnDisk,
    /// The prompt's states, and the negative prompt's where guidance asks for it.
    pub(super) words: &'a [Tensor],
    /// Who was asked last, with what it read.
    pub(super) asked: Option<(bool, Expert)>,
}

impl Experts for Told<'_> {
    fn config(&self) -> &dit::Config {
        &self.experts.config
    }

    fn ask(&mut self, high: bool) -> model::Result<Expert> {
        if let Some((of, expert)) = &self.asked
            && *of == high
        {
            return Ok(expert.clone());
        }
        // What the other one holds is released before this one is loaded.
        self.asked = None;
        let dit = self.experts.load(high)?;
        let mut words = self.words.iter().map(|states| Ok(Arc::new(dit.text(states)?)));
        let prompt = words.next().unwrap_or_else(|| Err(Error::Input("there is no prompt".into())))?;
        let negative = words.next().transpose()?;
        drop(words);
        Ok(self.asked.insert((high, Expert { dit, prompt, negative })).1.clone())
    }
}

/// Whether a checkpoint is of the base family and not one that hears.
pub(super) fn of_base(config: &Config) -> Result<bool> {
    Ok(match Found::of(config)? {
        Found::Random(whole, _) => whole.hearing.is_none(),
        Found::OnDisk(paths) => {
            let survey = Survey::of(&paths).map_err(|e: Error| AvatarError::Weights(e.to_string()))?;
            survey.part(Part::Speech).is_none() && survey.part(Part::Base).is_some()
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_for_which_noise_a_transformer_is() {
        for (path, high) in [
            ("m/high_noise_model/diffusion_pytorch_model-00001-of-00006.safetensors", Some(true)),
            ("m/low_noise_model/x.safetensors", Some(false)),
            ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", Some(true)),
            ("HighNoise/Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf", Some(true)),
            ("Wan2.2-I2V-A14B-LowNoise-Q8_0.gguf", Some(false)),
            ("m/transformer/diffusion_pytorch_model-00001-of-00012.safetensors", Some(true)),
            ("m/transformer_2/diffusion_pytorch_model-00001-of-00012.safetensors", Some(false)),
            ("m/wan2.2_ti2v_5B_fp16.safetensors", None),
        ] {
            assert_eq!(noise(Path::new(path)), high, "{path}");
        }
    }
}
