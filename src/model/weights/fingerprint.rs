//! What tells one model from another.

use sha2::{Digest, Sha256};

use super::{Stored, WeightStore};
use crate::model::family::ModelConfig;

/// Bytes looked at, at either end of a tensor.
const SAMPLE: usize = 16 << 10;

impl WeightStore {
    /// SHA-256 over the model's shape and, for every tensor in order of its name, its name, element type, shape and
    /// the bytes at either end: training changes all tensors of a model, so that reading a few megabytes tells two
    /// models apart. It guards against a mix-up, not against a forger. How the tensors are spread over files is no
    /// matter.
    pub fn fingerprint(&self, model: &ModelConfig) -> String {
        let mut hash = Sha256::new();
        hash.update(shape(model));
        for (name, (_, stored)) in &self.tensors {
            let (dtype, shape, bytes) = match stored {
                Stored::Ready(tensor) => (tensor.dtype.to_string(), &tensor.shape, tensor.bytes()),
                Stored::Packed(packed) => (packed.dtype.to_string(), &packed.shape, packed.data.bytes()),
            };
            hash.update(format!("\n{name} {dtype} {shape:?}\n"));
            hash.update(&bytes[..bytes.len().min(SAMPLE)]);
            hash.update(&bytes[bytes.len().saturating_sub(SAMPLE)..]);
        }
        hex(&hash.finalize())
    }
}

/// What the tensors do not say of a model: how they are put together. Written out, so that a field more in
/// [`ModelConfig`] does not make another model of every checkpoint.
fn shape(m: &ModelConfig) -> String {
    format!(
        "{} {} layers, {} / {} heads of {}, eps {}, {:?} {:?} {} {:?}, caps {:?} {:?}, windows {:?}, {} positions",
        m.family.name,
        m.num_layers,
        m.num_q_heads,
        m.num_kv_heads,
        m.head_dim,
        m.rms_norm_eps,
        m.rope,
        m.local_rope,
        m.sm_scale,
        m.activation,
        m.attn_softcap,
        m.logit_softcap,
        m.windows,
        m.max_position_embeddings,
    )
}

/// SHA-256 of a text or a file, as `sha256sum` prints it.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    #[test]
    fn a_text_has_its_published_digest() {
        assert_eq!(sha256(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn other_weights_types_or_shapes_have_another_fingerprint() {
        let tiny = ModelConfig::shape("tiny").unwrap();
        let of = |model: &ModelConfig, seed, dtype| WeightStore::random(&tiny, seed, dtype).unwrap().fingerprint(model);
        let one = of(&tiny, 1, DType::Bf16);
        assert_eq!(one, of(&tiny, 1, DType::Bf16));
        assert_ne!(one, of(&tiny, 2, DType::Bf16));
        assert_ne!(one, of(&tiny, 1, DType::F32));
        assert_ne!(one, of(&ModelConfig { rms_norm_eps: 5e-5, ..tiny.clone() }, 1, DType::Bf16));
    }
}
