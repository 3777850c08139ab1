//! Packed files: round trips, and everything that can be wrong with one.

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::load::test_files::{GgufFile, TINY_TENSORS, tiny, write_hugging_face};
use crate::weights::LayerWeights;

const TYPES: [(DType, DType); 4] = [
    (DType::F32, DType::F32),
    (DType::Bf16, DType::Bf16),
    (DType::Q8, DType::Q8),
    (DType::Q4, DType::Q8),
];

/// A model's file and a directory for what is kept of it.
struct Place(TempDir);

impl Place {
    fn of(file: &GgufFile) -> Self {
        let place = Self(tempfile::tempdir().expect("a directory"));
        place.write_source(file);
        place
    }

    fn source(&self) -> PathBuf {
        self.0.path().join("tiny.gguf")
    }

    fn write_source(&self, file: &GgufFile) {
        fs::write(self.source(), file.bytes()).expect("writable");
    }

    fn directory(&self) -> PathBuf {
        self.0.path().join("data/packed")
    }

    fn open(&self) -> Checkpoint {
        Checkpoint::open(&self.source()).expect("a checkpoint")
    }

    fn load(&self, types: (DType, DType)) -> (Weights, Keeping) {
        Weights::load_kept(&self.open(), types.0, types.1, &self.directory()).expect("loads")
    }

    /// The only file that is kept.
    fn kept(&self) -> PathBuf {
        let mut files = self.files();
        assert_eq!(files.len(), 1, "{files:?}");
        files.remove(0)
    }

    fn files(&self) -> Vec<PathBuf> {
        let files = fs::read_dir(self.directory()).expect("a directory");
        files.map(|f| f.expect("a file").path()).collect()
    }

    /// Puts something else in the place of a kept file; those are read-only.
    fn replace(&self, bytes: &[u8]) {
        let path = self.kept();
        fs::remove_file(&path).expect("removable");
        fs::write(path, bytes).expect("writable");
    }
}

/// Every bit of the weights.
fn all_bits(weights: &Weights) -> Vec<u8> {
    let mut bits = weights.embedding.panels().to_vec();
    bits.extend(weights.head.iter().flat_map(|head| head.panels()));
    let vector = |bits: &mut Vec<u8>, values: &[f32]| {
        bits.extend(values.iter().flat_map(|x| x.to_bits().to_le_bytes()));
        // Two vectors are not one.
        bits.push(0xff);
    };
    vector(&mut bits, &weights.final_norm);
    for layer in &weights.layers {
        let LayerWeights { qkv, output, gate_up, down, .. } = layer;
        for matrix in [qkv, output, gate_up, down] {
            bits.extend(matrix.panels());
        }
        let (query, key) = layer.qk_norm.clone().unzip();
        for values in [
            Some(&layer.attention_norm),
            layer.qkv_bias.as_ref(),
            query.as_ref(),
            key.as_ref(),
            layer.post_attention_norm.as_ref(),
            Some(&layer.ffn_norm),
            layer.post_ffn_norm.as_ref(),
        ] {
            vector(&mut bits, values.map_or(&[], Vec::as_slice));
        }
    }
    bits
}

fn instead(keeping: &Keeping) -> Option<&str> {
    match keeping {
        Keeping::Written { instead, .. } => instead.as_deref(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_was_packed_once_is_mapped_with_the_same_bits() {
    let biased = tiny("qwen2")
        .counted("blk.0.attn_q.bias", &[32], 0.5)
        .counted("blk.0.attn_k.bias", &[16], 1.5)
        .counted("blk.0.attn_v.bias", &[16], 2.5);
    for (file, what) in [(tiny("llama"), "llama"), (biased, "qwen2")] {
        let place = Place::of(&file);
        for types in TYPES {
            let plain = Weights::load(&place.open(), types.0, types.1).expect("loads");
            let (first, keeping) = place.load(types);
            assert_eq!(instead(&keeping), None);
            let (second, found) = place.load(types);
            assert_eq!(found, Keeping::Found, "{what} {types:?}");
            assert!(all_bits(&plain) == all_bits(&first), "{what} {types:?}");
            assert!(all_bits(&plain) == all_bits(&second), "{what} {types:?}");
            assert_eq!(plain.layers[0].qkv_bias.is_some(), what == "qwen2");
            assert_eq!(plain.bytes(), second.bytes());
        }
        assert_eq!(place.files().len(), TYPES.len());
    }
}

#[test]
fn directories_are_kept_like_files_and_their_configuration_counts() {
    let folder = tempfile::tempdir().expect("a directory");
    let (source, packed) = (folder.path().join("model"), folder.path().join("packed"));
    fs::create_dir(&source).expect("writable");
    write_hugging_face(&source, "LlamaForCausalLM", &TINY_TENSORS, "F32");
    let load = || {
        let checkpoint = Checkpoint::open(&source).expect("a checkpoint");
        Weights::load_kept(&checkpoint, DType::F32, DType::F32, &packed).expect("loads")
    };
    let (first, _) = load();
    let (second, keeping) = load();
    assert!(keeping == Keeping::Found && all_bits(&first) == all_bits(&second));
    let config = source.join("config.json");
    let text = fs::read_to_string(&config).expect("readable");
    fs::write(&config, text.replace("Llama", "Gemma")).expect("writable");
    let (other, keeping) = load();
    assert!(instead(&keeping).is_some_and(|why| why.contains("has changed")), "{keeping:?}");
    // Gemma's norms lack one.
    assert_eq!(other.final_norm[0], first.final_norm[0] + 1.0);
}

#[test]
fn another_state_of_the_source_takes_the_place_of_the_old_one() {
    let place = Place::of(&tiny("llama"));
    place.load(TYPES[0]);
    let time = fs::metadata(place.source()).and_then(|m| m.modified()).expect("a time");
    // As long as the other, and of the same time: the samples differ.
    let norm = |base| {
        tiny("llama").without("output_norm.weight").counted("output_norm.weight", &[32], base)
    };
    for base in [1.0, 9.0, 5.0] {
        place.write_source(&norm(base));
        let file = File::options().append(true).open(place.source()).expect("opens");
        file.set_modified(time).expect("a time");
        let (weights, keeping) = place.load(TYPES[0]);
        assert_eq!(instead(&keeping), Some("the model's file or the layout has changed"));
        assert_eq!(weights.final_norm[0], base);
        place.kept();
    }
    // The same bytes at another time may be others.
    place.write_source(&norm(5.0));
    let later = time + Duration::from_secs(2);
    let file = File::options().append(true).open(place.source()).expect("opens");
    file.set_modified(later).expect("a time");
    assert!(instead(&place.load(TYPES[0]).1).is_some());
    assert_eq!(place.load(TYPES[0]).1, Keeping::Found);
}

#[test]
fn a_damaged_file_is_packed_anew() {
    let place = Place::of(&tiny("llama"));
    let types = TYPES[3];
    let (weights, _) = place.load(types);
    let (bits, whole) = (all_bits(&weights), fs::read(place.kept()).expect("readable"));
    let names = Names::of(&place.open(), types.0, types.1, &place.directory()).expect("names");
    let head = names.head.len();
    let with = |at: usize, byte: u8| {
        let mut bytes = whole.clone();
        bytes[at] ^= byte;
        bytes
    };
    let end = |more: &[u8]| [&whole[..], more].concat();
    let mut damaged = vec![
        (Vec::new(), "0 bytes are too few"),
        (whole[..head - 1].to_vec(), "are too few"),
        (whole[..head].to_vec(), "it is cut off"),
        (whole[..whole.len() / 2].to_vec(), "it is cut off"),
        (whole[..whole.len() - 1].to_vec(), "its table or its length"),
        (end(&[0]), "its table or its length"),
        (end(&whole), "its table or its length"),
        (b"GGUF".repeat(1000), "it holds no packed weights"),
        (with(0, 1), "it holds no packed weights"),
        (with(8, 2), "it is of another version"),
        (with(12, 1), "the model's file or the layout has changed"),
    ];
    damaged.extend((MAGIC.len() + 4..head).map(|at| (with(at, 0x40), "has changed")));
    let table = whole.len() - whole.iter().rev().position(|b| *b == 0).expect("a margin");
    damaged.extend((table..whole.len()).map(|at| (with(at, 1), "its table or its length")));
    for (bytes, why) in damaged {
        place.replace(&bytes);
        let (weights, keeping) = place.load(types);
        assert!(instead(&keeping).is_some_and(|w| w.contains(why)), "{why}: {keeping:?}");
        assert!(all_bits(&weights) == bits, "{why}");
        assert!(fs::read(place.kept()).expect("readable") == whole, "{why}");
    }
    assert_eq!(place.load(types).1, Keeping::Found);
}

#[test]
fn files_are_not_taken_for_those_of_other_types() {
    let place = Place::of(&tiny("llama"));
    place.load(TYPES[2]);
    let bytes = fs::read(place.kept()).expect("readable");
    let other = Names::of(&place.open(), DType::F32, DType::F32, &place.directory());
    fs::write(other.expect("names").path, bytes).expect("writable");
    assert!(instead(&place.load(TYPES[0]).1).is_some_and(|why| why.contains("has changed")));
}

#[test]
fn kept_files_are_read_only() {
    let place = Place::of(&tiny("llama"));
    place.load(TYPES[0]);
    assert!(fs::metadata(place.kept()).expect("a file").permissions().readonly());
}

#[test]
fn where_nothing_can_be_written_weights_are_packed_all_the_same() {
    let place = Place::of(&tiny("llama"));
    let bits = all_bits(&place.load(TYPES[0]).0);
    // No directory can be made within a file.
    let (weights, keeping) =
        Weights::load_kept(&place.open(), DType::F32, DType::F32, &place.source().join("packed"))
            .expect("loads");
    assert!(matches!(keeping, Keeping::NotKept(why) if why.contains("tiny.gguf/packed: ")));
    assert!(all_bits(&weights) == bits);
    // Nor can a directory be replaced by a file, and what was begun is removed.
    let path = place.kept();
    fs::remove_file(&path).expect("removable");
    fs::create_dir_all(path.join("in the way")).expect("writable");
    let (weights, keeping) = place.load(TYPES[0]);
    assert!(matches!(keeping, Keeping::NotKept(_)), "{keeping:?}");
    assert!(all_bits(&weights) == bits && place.kept() == path);
}

#[test]
fn what_killed_runs_left_is_swept_away_after_a_day() {
    let place = Place::of(&tiny("llama"));
    fs::create_dir_all(place.directory()).expect("writable");
    let leave = |name: &str, hours: u64| {
        let file = File::create(place.directory().join(name)).expect("writable");
        let then = std::time::SystemTime::now() - Duration::from_hours(hours);
        file.set_modified(then).expect("a time");
    };
    leave(".packing-old", 25);
    leave(".packing-new", 23);
    leave("something.else", 1000);
    place.load(TYPES[0]);
    let files = place.files();
    let there = |name: &str| files.iter().any(|f| f.ends_with(name));
    assert!(!there(".packing-old") && there(".packing-new") && there("something.else"));
    assert_eq!(files.len(), 3);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever is written over a kept file, the weights are those of the model, or it was none of head and table.
    #[test]
    fn hostile_bytes_lead_nowhere(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        in_head in any::<bool>(),
        length in prop::option::of(0.0f64..1.5),
    ) {
        let place = Place::of(&tiny("llama"));
        let types = TYPES[3];
        let bits = all_bits(&place.load(types).0);
        let whole = fs::read(place.kept()).expect("readable");
        let names = Names::of(&place.open(), types.0, types.1, &place.directory());
        let head = names.expect("names").head.len();
        let mut bytes = whole.clone();
        for (at, byte) in changes {
            let at = at.index(if in_head { head } else { bytes.len() });
            bytes[at] = byte;
        }
        if let Some(share) = length {
            bytes.resize((share * whole.len() as f64) as usize, 0x5a);
        }
        place.replace(&bytes);
        let (weights, keeping) = place.load(types);
        if keeping == Keeping::Found {
            prop_assert!(bytes[..head] == whole[..head] && bytes.len() == whole.len());
        } else {
            prop_assert!(all_bits(&weights) == bits);
        }
    }
}
