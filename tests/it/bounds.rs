//! How much memory a hostile checkpoint or picture can make the readers take: counted, by an allocator that keeps a
//! tally for each thread.

use image::{ExtendedColorType, ImageEncoder as _};
use loquent::{
    codec::picture::{PictureLimits, decode_portrait},
    model::weights::open,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    fs,
    path::{Path, PathBuf},
};

thread_local! {
    /// Bytes that this thread holds, and the most since [`most`] began.
    static HELD: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

struct Counting;

fn count(bytes: isize) {
    // A thread that ends has no tally any more.
    let _ = HELD.try_with(|held| {
        let now = held.get().0 + bytes;
        held.set((now, held.get().1.max(now)));
    });
}

// SAFETY: everything is the system allocator's; the tally does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes that `work` held at a time.
fn most<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = HELD.with(|held| {
        held.set((held.get().0, held.get().0));
        held.get().0
    });
    let made = work();
    (made, HELD.with(|held| (held.get().1 - before).max(0) as usize))
}

/// Opens a file and reads all that it claims to hold; whether it was opened.
fn read(path: &Path) -> Result<(), String> {
    let c = open(path).map_err(|e| e.to_string())?;
    for name in c.source.names() {
        let _ = c.source.load(&name);
        let _ = c.source.quantised(&name);
    }
    Ok(())
}

fn scratch() -> PathBuf {
    let folder = std::env::temp_dir().join(format!("loquent-bounds-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// A torch archive with this pickle and one storage of eight bytes.
fn archive(pickle: &[u8]) -> Vec<u8> {
    let files = [("a/data.pkl", pickle), ("a/data/0", &[0; 8][..])];
    super::layouts::stored_zip(&files.map(|(name, bytes)| (name.to_string(), bytes.to_vec())))
}

/// A pickled tensor of one number; the name is put before it.
const TENSOR: &[u8] = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\00X\x03\0\0\0cpuK\x01tQK\0K\x01\x85K\x01\x85\x89}tR";

fn text(of: &[u8]) -> Vec<u8> {
    [b"X", &(of.len() as u32).to_le_bytes()[..], of].concat()
}

/// Files that are small and claim to be large, each with what is said of it.
fn bombs() -> Vec<(&'static str, Vec<u8>)> {
    let n = 2 << 20;
    let gguf = |tensors: u64, values: u64, rest: &[u8]| {
        [b"GGUF\x03\0\0\0", &tensors.to_le_bytes()[..], &values.to_le_bytes(), rest].concat()
    };
    let header = |json: &str| [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &[0; 16]].concat();
    let huge = u64::MAX / 2;
    let key = [&1u64.to_le_bytes()[..], b"k"].concat();
    let list = [&9u32.to_le_bytes()[..], &4u32.to_le_bytes(), &huge.to_le_bytes()].concat();
    // A name of a megabyte, recalled for every one of many tensors.
    let named: Vec<u8> = [&b"\x80\x02}("[..], &text(&vec![b'n'; 1 << 20]), b"q\0", TENSOR, b"q\x01"].concat();
    let named = [named, b"h\0h\x01".repeat(200_000), b"u.".to_vec()].concat();
    let mut empty = huge.to_le_bytes().repeat(8);
    empty[..8].fill(0);
    let empty = [&key[..], &8u32.to_le_bytes(), &empty, &[0; 12]].concat();
    let axes = [&key[..], &8u32.to_le_bytes(), &huge.to_le_bytes().repeat(8), &[0; 12]].concat();
    vec![
        ("a pickle of empty tuples", archive(&[b"\x80\x02".to_vec(), vec![b')'; n], vec![b'.']].concat())),
        ("a pickle of numbers", archive(&[b"\x80\x02".to_vec(), b"K\x01".repeat(n), vec![b'.']].concat())),
        ("a pickle of doubles", archive(&[b"\x80\x02)".to_vec(), vec![b'2'; n], vec![b'.']].concat())),
        ("a pickle of marks", archive(&[b"\x80\x02".to_vec(), vec![b'('; n], vec![b'.']].concat())),
        ("a pickle of one long name", archive(&named)),
        ("a pickled text of four gigabytes", archive(b"\x80\x02X\xff\xff\xff\xffx.")),
        ("a pickle of eight times that", archive(b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\x7fx.")),
        ("GGUF with endless tensors", gguf(huge, 0, &[0; 64])),
        ("GGUF with endless values", gguf(0, huge, &[0; 64])),
        ("GGUF with an endless list", gguf(0, 1, &[&key[..], &list, &[0; 64]].concat())),
        ("GGUF with an endless name", gguf(1, 0, &huge.to_le_bytes())),
        ("GGUF with endless axes", gguf(1, 0, &axes)),
        ("GGUF that is empty and endless", gguf(1, 0, &[&empty[..], &[0; 64]].concat())),
        ("safetensors with an endless header", [&huge.to_le_bytes()[..], b"{\"a\":"].concat()),
        (
            "safetensors with an endless shape",
            header(r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4,4],"data_offsets":[0,16]}}"#),
        ),
        ("safetensors that is empty and endless", {
            let json = r#"{"a":{"dtype":"F32","shape":[0,4611686018427387904,4],"data_offsets":[0,0]}}"#;
            [&(json.len() as u64).to_le_bytes()[..], json.as_bytes()].concat()
        }),
        (
            "safetensors beyond its end",
            header(r#"{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}"#),
        ),
    ]
}

#[test]
fn a_small_file_takes_little_memory_whatever_it_claims() {
    let folder = scratch();
    let path = folder.join("bomb");
    for (name, bytes) in bombs() {
        fs::write(&path, &bytes).unwrap();
        let (read, held) = most(|| read(&path));
        println!("{name}: {} bytes, {held} held, {read:?}", bytes.len());
        assert!(held < 160 << 20, "{name}: {} bytes made {held} bytes of memory", bytes.len());
        assert!(read.is_err() || name.contains("one long name"), "{name} was taken");
    }
    // Damaged files: not much more than they are long.
    let mut rng = StdRng::seed_from_u64(11);
    let (mut worst, mut refused) = (0, 0);
    for seed in super::checkpoints::seeds(&folder) {
        let good = fs::read(seed).unwrap();
        for round in 0..400 {
            let mut bad = good.clone();
            for _ in 0..rng.random_range(1..5) {
                // The beginning of a header is where lengths and counts stand; a zip's are at the end.
                let reach = bad.len().min(600);
                let at = rng.random_range(0..reach);
                let at = if round % 2 == 1 { bad.len() - 1 - at } else { at };
                bad[at] = if rng.random_bool(0.5) { 0xff } else { rng.random() };
            }
            fs::write(&path, &bad).unwrap();
            let (read, held) = most(|| read(&path));
            refused += usize::from(read.is_err());
            worst = worst.max(held);
            assert!(held < 64 * bad.len() + (1 << 20), "{} bytes made {held} bytes of memory", bad.len());
        }
    }
    println!("{refused} of 1200 refused, {worst} bytes at most");
    assert!(refused > 200, "{refused}: the mutations do not bite");
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_small_picture_takes_little_memory_whatever_it_claims() {
    // 2304 × 16704 pixels of 16 bits and four channels: few enough pixels, too many bytes. Found by
    // fuzzing, where checksums are not looked at; this one has the right one.
    let (read, held) = most(|| decode_portrait(include_bytes!("data/deep.png"), &PictureLimits::default()));
    println!("a deep picture: {held} held, {read:?}");
    let said = read.unwrap_err().to_string();
    assert!(held < 16 << 20, "{held} bytes of memory before {said}");
    assert!(said.contains("2304 × 16704") && said.contains("8 bits"), "{said}");
    // A colour profile that unfolds into more than the picture could ever take.
    let mut png = Vec::new();
    let mut encoder = image::codecs::png::PngEncoder::new(&mut png);
    encoder.set_icc_profile(vec![0; 300 << 20]).unwrap();
    encoder.write_image(&[7; 3 * 64 * 64], 64, 64, ExtendedColorType::Rgb8).unwrap();
    let (read, held) = most(|| decode_portrait(&png, &PictureLimits::default()));
    println!("a vast profile: {} bytes, {held} held", png.len());
    assert!(held < 160 << 20, "{} bytes made {held} bytes of memory", png.len());
    assert_eq!(read.unwrap().rgb[0], 7, "a profile is no reason to refuse a good picture");
}
