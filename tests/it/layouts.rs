//! One random model in every layout that users have on disk, each made into a video by `generate` as a user runs it: bf16 in
//! other names and files gives the same frames, quantised files give frames within a stated distance. And what is merged
//! or moved while loading: adapters, blocks that wait in main memory.

use super::{
    batch::{Folder, probe, said},
    names,
};
use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
};

type Numbers = BTreeMap<String, Tensor>;

const TRANSFORMER: &str = "diffusion_pytorch_model-00001-of-00001.safetensors";
const VAE: &str = "Wan2.1_VAE.safetensors";
const TEXT: &str = "models_t5_umt5-xxl-enc-bf16.safetensors";
const HEARING: &str = "wav2vec2-large-xlsr-53-english";
const TOKENIZER: &str = "google/umt5-xxl/tokenizer.json";

/// The random model in the official layout, and its numbers.
struct Model {
    folder: Folder,
    transformer: Numbers,
    vae: Numbers,
    text: Numbers,
}

impl Model {
    fn new(name: &str) -> Model {
        let folder = Folder::new(name);
        folder.speech("in.wav", 0.3);
        folder.synth("tiny");
        let read = |file: &str| -> Numbers {
            candle_core::safetensors::load(folder.0.join("tiny").join(file), &Device::Cpu)
                .unwrap()
                .into_iter()
                .collect()
        };
        Model { transformer: read(TRANSFORMER), vae: read(VAE), text: read(TEXT), folder }
    }

    /// A folder with what no layout changes: audio encoder and tokenizer, and the transformer's `config.json`.
    fn layout(&self, name: &str) -> PathBuf {
        let (from, to) = (self.folder.0.join("tiny"), self.folder.0.join(name));
        for part in ["audio_encoder", "tokenizer", "transformer", "vae", "text_encoder"] {
            fs::create_dir_all(to.join(part)).unwrap();
        }
        for file in ["model.safetensors", "config.json"] {
            fs::copy(from.join(HEARING).join(file), to.join("audio_encoder").join(file)).unwrap();
        }
        fs::copy(from.join(TOKENIZER), to.join("tokenizer/tokenizer.json")).unwrap();
        fs::copy(from.join("config.json"), to.join("transformer/config.json")).unwrap();
        to
    }

    /// Frames of one short clip with guidance, so that both prompts are read.
    fn clip(&self, checkpoint: &str, more: &[&str]) -> Vec<u8> {
        let clip = ["--mode", "clip", "--clip-frames", "8", "--guidance", "2", "--size", "64x64"];
        self.frames(checkpoint, &[&clip[..], more].concat())
    }

    fn frames(&self, checkpoint: &str, more: &[&str]) -> Vec<u8> {
        let plain = ["--checkpoint", checkpoint, "--steps", "1", "--presenter", "ada", "--audio", "in.wav", "--quiet"];
        let out = ["--out", "out.mp4", "--raw-frames", "out.rgb"];
        let done = self.folder.generate(&[&plain[..], &out, more].concat()).output().unwrap();
        assert!(done.status.success(), "{checkpoint} {more:?}: {}", said(&done));
        fs::read(self.folder.0.join("out.rgb")).unwrap()
    }
}

/// Mean distance of two videos in levels of 0…255.
fn levels(a: &[u8], b: &[u8]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / a.len() as f64
}

fn safetensors(numbers: &Numbers, name: impl Fn(&str) -> String, path: &Path) {
    let renamed: HashMap<String, Tensor> = numbers.iter().map(|(n, t)| (name(n), t.clone())).collect();
    candle_core::safetensors::save(&renamed, path).unwrap();
}

/// As `torch.save` of a flat state dict writes it: a stored zip with a pickle of protocol 2 and a file per storage.
fn torch(numbers: &Numbers, path: &Path) {
    let mut pickle = b"\x80\x02}(".to_vec();
    let text = |pickle: &mut Vec<u8>, text: &str| {
        pickle.push(b'X');
        pickle.extend((text.len() as u32).to_le_bytes());
        pickle.extend(text.as_bytes());
    };
    let int = |pickle: &mut Vec<u8>, n: usize| {
        pickle.push(b'J');
        pickle.extend((n as i32).to_le_bytes());
    };
    let mut files = Vec::new();
    for (i, (name, t)) in numbers.iter().enumerate() {
        let bytes: Vec<u8> =
            t.flatten_all().unwrap().to_vec1::<half::bf16>().unwrap().iter().flat_map(|v| v.to_le_bytes()).collect();
        text(&mut pickle, name);
        // torch._utils._rebuild_tensor_v2(storage, 0, shape, stride, False, OrderedDict())
        pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut pickle, "storage");
        pickle.extend(b"ctorch\nBFloat16Storage\n");
        text(&mut pickle, &i.to_string());
        text(&mut pickle, "cpu");
        int(&mut pickle, t.elem_count());
        pickle.extend(b"tQ");
        int(&mut pickle, 0);
        for list in [t.dims().to_vec(), t.stride().to_vec()] {
            pickle.push(b'(');
            list.iter().for_each(|n| int(&mut pickle, *n));
            pickle.push(b't');
        }
        pickle.extend(b"\x89ccollections\nOrderedDict\n)RtR");
        files.push((format!("archive/data/{i}"), bytes));
    }
    pickle.extend(b"u.");
    files.insert(0, ("archive/data.pkl".into(), pickle));
    fs::write(path, stored_zip(&files)).unwrap();
}

/// A zip archive of stored files.
pub(crate) fn stored_zip(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, bytes) in files {
        let (at, size, length) = (out.len() as u32, bytes.len() as u32, name.len() as u16);
        // Version, flags, method (stored), time, date, checksum (nobody looks), sizes, lengths.
        let head = [
            &[20u8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0][..],
            &size.to_le_bytes(),
            &size.to_le_bytes(),
            &length.to_le_bytes(),
            &[0, 0],
        ]
        .concat();
        out.extend([b"PK\x03\x04", &head[..], name.as_bytes(), bytes].concat());
        directory.extend([b"PK\x01\x02", &[20u8, 0][..], &head, &[0; 10], &at.to_le_bytes(), name.as_bytes()].concat());
    }
    let (at, size, count) = (out.len() as u32, directory.len() as u32, (files.len() as u16).to_le_bytes());
    out.extend(&directory);
    out.extend([b"PK\x05\x06", &[0; 4][..], &count, &count, &size.to_le_bytes(), &at.to_le_bytes(), &[0, 0]].concat());
    out
}

/// Matrices that quantisers quantise: those of the blocks and injectors.
fn large(name: &str, t: &Tensor) -> bool {
    t.rank() == 2 && name.ends_with(".weight") && (name.starts_with("blocks.") || name.starts_with("audio_injector."))
}

/// As ComfyUI's `fp8_scaled` files: e4m3 over the full range with a scale, official names below a prefix.
fn fp8_scaled(numbers: &Numbers, path: &Path) {
    let mut all = HashMap::from([("scaled_fp8".to_string(), Tensor::zeros(0, DType::U8, &Device::Cpu).unwrap())]);
    for (name, t) in numbers {
        let full = format!("model.diffusion_model.{name}");
        let t = match large(name, t) {
            true => {
                let wide = t.to_dtype(DType::F32).unwrap();
                let scale = wide.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() / 448.0;
                let scales = Tensor::new(&[scale], &Device::Cpu).unwrap();
                all.insert(full.replace(".weight", ".scale_weight"), scales);
                (wide / f64::from(scale)).unwrap().to_dtype(DType::F8E4M3).unwrap()
            }
            false => t.clone(),
        };
        all.insert(full, t);
    }
    candle_core::safetensors::save(&all, path).unwrap();
}

/// As converters to GGUF write it: large matrices in blocks of `kind`, or of Q8_0 where rows do not fill blocks of 256.
fn gguf(
    numbers: &Numbers,
    name: impl Fn(&str) -> String,
    large: impl Fn(&str, &Tensor) -> bool,
    kind: GgmlDType,
    path: &Path,
) {
    let all: Vec<(String, QTensor)> = (numbers.iter())
        .map(|(n, t)| {
            let fits = |kind: GgmlDType| t.dims().last().is_some_and(|w| w % kind.block_size() == 0);
            let kind = match large(n, t) {
                true => [kind, GgmlDType::Q8_0].into_iter().find(|k| fits(*k)).unwrap_or(GgmlDType::F16),
                false => GgmlDType::F32,
            };
            (name(n), QTensor::quantize(&t.to_dtype(DType::F32).unwrap(), kind).unwrap())
        })
        .collect();
    let refs: Vec<(&str, &QTensor)> = all.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let arch = gguf_file::Value::String("wan".into());
    gguf_file::write(&mut fs::File::create(path).unwrap(), &[("general.architecture", &arch)], &refs).unwrap();
}

fn same(name: &str) -> String {
    name.to_string()
}

#[test]
fn every_layout_of_the_same_numbers_gives_the_same_video() {
    let m = Model::new("layouts");
    let plain = m.clip("tiny", &[]);
    assert_eq!(plain.len(), 5 * 3 * 64 * 64);
    // The official folder with its pickles.
    let pickled = m.layout("pickled");
    fs::copy(m.folder.0.join("tiny").join(TRANSFORMER), pickled.join("transformer/model.safetensors")).unwrap();
    torch(&m.vae, &pickled.join("vae/Wan2.1_VAE.pth"));
    torch(&m.text, &pickled.join("text_encoder/models_t5_umt5-xxl-enc-bf16.pth"));
    assert!(m.clip("pickled", &[]) == plain, "torch pickles");
    // Diffusers.
    let d = m.layout("diffusers");
    let file = "diffusion_pytorch_model.safetensors";
    safetensors(&m.transformer, names::diffusers_transformer, &d.join("transformer").join(file));
    safetensors(&m.vae, names::diffusers_vae21, &d.join("vae").join(file));
    safetensors(&m.text, names::transformers_text, &d.join("text_encoder/model.safetensors"));
    assert!(m.clip("diffusers", &[]) == plain, "Diffusers");
    // ComfyUI: single files, named one by one.
    let c = m.layout("comfy");
    safetensors(&m.transformer, |n| format!("model.diffusion_model.{n}"), &c.join("transformer/s2v_bf16.safetensors"));
    safetensors(&m.vae, same, &c.join("vae/wan_2.1_vae.safetensors"));
    safetensors(&m.text, names::transformers_text, &c.join("text_encoder/umt5_xxl.safetensors"));
    let files = ["transformer/s2v_bf16.safetensors", "vae", "text_encoder", "audio_encoder", "tokenizer"];
    let paths: Vec<String> = files.iter().map(|f| format!("comfy/{f}")).collect();
    let more: Vec<&str> = paths[1..].iter().flat_map(|p| ["--checkpoint", p.as_str()]).collect();
    assert!(m.clip(&paths[0], &more) == plain, "ComfyUI");
    // Quantised, within so many levels of 255 on average. The random video spans the whole range, which is as hard as
    // it gets; another seed lies further away than any of them.
    let other = levels(&m.clip("tiny", &["--seed", "2"]), &plain);
    println!("another seed: {other:.2} levels away");
    let put = |name: &str, transformer: &dyn Fn(&Path), text: &dyn Fn(&Path)| {
        let folder = m.layout(name);
        transformer(&folder.join("transformer/model.bin"));
        fs::copy(m.folder.0.join("tiny").join(VAE), folder.join("vae/vae.safetensors")).unwrap();
        text(&folder.join("text_encoder/model.bin"));
    };
    let bf16 = |path: &Path| safetensors(&m.text, same, path);
    put("fp8_scaled", &|p| fp8_scaled(&m.transformer, p), &bf16);
    let in_text = |n: &str, t: &Tensor| t.rank() == 2 && n.starts_with("blocks.") && !n.contains("pos_embedding");
    for (name, kind) in [("Q8_0", GgmlDType::Q8_0), ("Q4_K", GgmlDType::Q4K)] {
        put(name, &|p| gguf(&m.transformer, same, large, kind, p), &|p| {
            gguf(&m.text, names::llama_text, in_text, kind, p)
        });
    }
    for (name, limit) in [("fp8_scaled", 3.0), ("Q8_0", 3.0), ("Q4_K", 6.0)] {
        let away = levels(&m.clip(name, &[]), &plain);
        println!("{name}: {away:.3} levels away");
        assert!(away > 0.0 && away < limit && away < other / 4.0, "{name}: {away} levels away, another seed {other}");
    }
}

#[test]
fn adapters_and_offloading_do_what_they_say() {
    let m = Model::new("adapters");
    let plain = m.clip("tiny", &[]);
    assert!(m.clip("tiny", &["--offload", "blocks"]) == plain, "where blocks wait does not matter");
    // LiveAvatar's layout at rank 4, with which the mode is block: alpha 64 makes the factor 16, half weight 8.
    let wave = |n: usize, k: f32| -> Vec<f32> { (0..n).map(|i| (i as f32 * k).sin() * 0.05).collect() };
    let (mut adapter, mut merged) = (HashMap::new(), m.transformer.clone());
    for name in ["blocks.1.self_attn.q", "blocks.2.ffn.2", "audio_injector.injector.0.v"] {
        let weight = &m.transformer[&format!("{name}.weight")];
        let (out, width) = weight.dims2().unwrap();
        let a = Tensor::from_vec(wave(4 * width, 0.7), (4, width), &Device::Cpu).unwrap();
        let b = Tensor::from_vec(wave(4 * out, 0.3), (out, 4), &Device::Cpu).unwrap();
        let sum = weight.to_dtype(DType::F32).unwrap() + (b.matmul(&a).unwrap() * 8.0).unwrap();
        merged.insert(format!("{name}.weight"), sum.unwrap());
        adapter.insert(format!("base_model.model.{name}.lora_A.default.weight"), a);
        adapter.insert(format!("base_model.model.{name}.lora_B.default.weight"), b);
    }
    candle_core::safetensors::save(&adapter, m.folder.0.join("live.safetensors")).unwrap();
    assert!(m.clip("tiny", &["--lora", "live.safetensors:0"]) == plain, "weight 0 changes nothing");
    let half = m.clip("tiny", &["--lora", "live.safetensors:0.5"]);
    let whole = m.layout("merged");
    safetensors(&merged, same, &whole.join("transformer/model.safetensors"));
    fs::copy(m.folder.0.join("tiny").join(VAE), whole.join("vae/vae.safetensors")).unwrap();
    safetensors(&m.text, same, &whole.join("text_encoder/text.safetensors"));
    let (away, from_plain) = (levels(&half, &m.clip("merged", &[])), levels(&half, &plain));
    println!("adapter at half weight: {away:.3} levels from the merged file, {from_plain:.3} from none");
    assert!(away < 0.05 && from_plain > 20.0 * away.max(0.01), "{away} and {from_plain}");
    m.frames("tiny", &["--lora", "live.safetensors", "--size", "64x64"]);
    assert_eq!(probe(&m.folder.0.join("out.mp4")), "64,64,25/1,8", "block mode by itself");
}

#[test]
fn a_clip_may_begin_with_the_picture_itself() {
    let m = Model::new("first");
    let (free, bound) = (m.clip("tiny", &[]), m.clip("tiny", &["--first-frame"]));
    // Both show the whole voice; without three lost frames the first clip is longer.
    assert!(free.len() == bound.len() && free != bound);
}

#[test]
fn the_small_decoder_makes_the_pictures_where_it_is_asked_for() {
    let m = Model::new("small");
    let plain = m.clip("tiny", &[]);
    let mut refused =
        m.folder.generate(&["--checkpoint", "tiny", "--small-decoder", "--audio", "in.wav", "--out", "no.mp4"]);
    let text = said(&refused.output().unwrap());
    assert!(text.contains("no small video decoder") && text.contains("taew2_1"), "{text}");
    let mut synth = std::process::Command::new(env!("CARGO_BIN_EXE_loquent"));
    let args = ["model", "synth", "taew2_1", "taew2_1.safetensors"];
    assert!(synth.args(args).current_dir(&m.folder.0).output().unwrap().status.success());
    let both = ["--checkpoint", "taew2_1.safetensors"];
    assert!(m.clip("tiny", &both) == plain, "a file that lies there changes nothing");
    let small = m.clip("tiny", &[&both[..], &["--small-decoder"]].concat());
    assert!(small.len() == plain.len() && small != plain);
    m.frames("random:tiny", &["--mode", "block", "--size", "64x64", "--small-decoder"]);
    assert_eq!(probe(&m.folder.0.join("out.mp4")), "64,64,25/1,8");
}
