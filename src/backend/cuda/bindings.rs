//! Made by bindgen from include/rksc_kernels.h: `cargo check --features regen-bindings`. Not edited by hand.

pub const RKSC_ATTENTION_MAX_ROWS: u32 = 64;
pub const RKSC_TILE_SLOTS: u32 = 64;
pub const RKSC_SKINNY_MAX_ROWS: u32 = 16;
pub const RKSC_NO_SLOT: u32 = 4294967295;
pub const RKSC_NO_PARTIAL: u32 = 4294967295;
pub type rksc_stream = *mut ::core::ffi::c_void;
pub const RKSC_F32: rksc_dtype = 0;
pub const RKSC_BF16: rksc_dtype = 1;
pub const RKSC_F16: rksc_dtype = 2;
pub type rksc_dtype = ::core::ffi::c_uint;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rksc_embed_params {
    pub table: *const ::core::ffi::c_void,
    pub ids: *const u32,
    pub x: *mut f32,
    pub num_rows: u32,
    pub hidden: u32,
    pub vocab: u32,
    pub dtype: u32,
    pub scale: f32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_embed_params"][::core::mem::size_of::<rksc_embed_params>() - 48usize];
    ["Alignment of rksc_embed_params"][::core::mem::align_of::<rksc_embed_params>() - 8usize];
    ["Offset of field: rksc_embed_params::table"][::core::mem::offset_of!(rksc_embed_params, table) - 0usize];
    ["Offset of field: rksc_embed_params::ids"][::core::mem::offset_of!(rksc_embed_params, ids) - 8usize];
    ["Offset of field: rksc_embed_params::x"][::core::mem::offset_of!(rksc_embed_params, x) - 16usize];
    ["Offset of field: rksc_embed_params::num_rows"][::core::mem::offset_of!(rksc_embed_params, num_rows) - 24usize];
    ["Offset of field: rksc_embed_params::hidden"][::core::mem::offset_of!(rksc_embed_params, hidden) - 28usize];
    ["Offset of field: rksc_embed_params::vocab"][::core::mem::offset_of!(rksc_embed_params, vocab) - 32usize];
    ["Offset of field: rksc_embed_params::dtype"][::core::mem::offset_of!(rksc_embed_params, dtype) - 36usize];
    ["Offset of field: rksc_embed_params::scale"][::core::mem::offset_of!(rksc_embed_params, scale) - 40usize];
    ["Offset of field: rksc_embed_params::reserved"][::core::mem::offset_of!(rksc_embed_params, reserved) - 44usize];
};
impl Default for rksc_embed_params {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rksc_add_rms_norm_params {
    pub x: *mut f32,
    pub delta: *const f32,
    pub post_norm: *const f32,
    pub weight: *const f32,
    pub y: *mut ::core::ffi::c_void,
    pub keep: *mut f32,
    pub reference: *const f32,
    pub similarity: *mut f32,
    pub num_rows: u32,
    pub hidden: u32,
    pub dtype: u32,
    pub eps: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_add_rms_norm_params"][::core::mem::size_of::<rksc_add_rms_norm_params>() - 80usize];
    ["Alignment of rksc_add_rms_norm_params"][::core::mem::align_of::<rksc_add_rms_norm_params>() - 8usize];
    ["Offset of field: rksc_add_rms_norm_params::x"][::core::mem::offset_of!(rksc_add_rms_norm_params, x) - 0usize];
    ["Offset of field: rksc_add_rms_norm_params::delta"]
        [::core::mem::offset_of!(rksc_add_rms_norm_params, delta) - 8usize];
    ["Offset of field: rksc_add_rms_norm_params::post_norm"]
        [::core::mem::offset_of!(rksc_add_rms_norm_params, post_norm) - 16usize];
    ["Offset of field: rksc_add_rms_norm_params::weight"]
        [::core::mem::offset_of!(rksc_add_rms_norm_params, weight) - 24usize];
    ["Offset of field: rksc_add_rms_norm_params::y"][::core::mem::offset_of!(rksc_add_rms_norm_params, y) - 32usize];
    ["Offset of field: rksc_add_rms_norm_params::keep"]
        [::core::mem::offset_of!(rksc_add_rms_norm_params, keep) - 40usize];
    ["Offset of field: rksc_add_rms_norm_params::reference"]
        [::core::mem::offset_of!(rksc_add_rms_norm_params, reference) - 48usize];
    ["Offset of field: rksc_add_rms_norm_params::similarity"]
        [::core::mem::offset_of!(rksc_add_rms_norm_params, similarity) - 56usize];
    ["Offset of field: rksc_add_rms_norm_params::num_rows"]
        [::core::mem::offset_of!(rksc_add_rms_norm_params, num_rows) - 64usize];
    ["Offset of field: rksc_add_rms_norm_params::hidden"]
        [::core::mem::offset_of!(rksc_add_rms_norm_params, hidden) - 68usize];
    ["Offset of field: rksc_add_rms_norm_params::dtype"]
        [::core::mem::offset_of!(rksc_add_rms_norm_params, dtype) - 72usize];
    ["Offset of field: rksc_add_rms_norm_params::eps"]
        [::core::mem::offset_of!(rksc_add_rms_norm_params, eps) - 76usize];
};
impl Default for rksc_add_rms_norm_params {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
pub const RKSC_EXIT_ENTER: rksc_exit_rule = 0;
pub const RKSC_EXIT_EVERY_NTH: rksc_exit_rule = 1;
pub const RKSC_EXIT_ABOVE: rksc_exit_rule = 2;
pub type rksc_exit_rule = ::core::ffi::c_uint;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rksc_exit_rows_params {
    pub exits: *const u32,
    pub similarity: *const f32,
    pub route: *mut f32,
    pub num_rows: u32,
    pub rule: u32,
    pub every: u32,
    pub offset: u32,
    pub tau: f32,
    pub share: f32,
    pub whole_batch: u32,
    pub layer: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_exit_rows_params"][::core::mem::size_of::<rksc_exit_rows_params>() - 56usize];
    ["Alignment of rksc_exit_rows_params"][::core::mem::align_of::<rksc_exit_rows_params>() - 8usize];
    ["Offset of field: rksc_exit_rows_params::exits"][::core::mem::offset_of!(rksc_exit_rows_params, exits) - 0usize];
    ["Offset of field: rksc_exit_rows_params::similarity"]
        [::core::mem::offset_of!(rksc_exit_rows_params, similarity) - 8usize];
    ["Offset of field: rksc_exit_rows_params::route"][::core::mem::offset_of!(rksc_exit_rows_params, route) - 16usize];
    ["Offset of field: rksc_exit_rows_params::num_rows"]
        [::core::mem::offset_of!(rksc_exit_rows_params, num_rows) - 24usize];
    ["Offset of field: rksc_exit_rows_params::rule"][::core::mem::offset_of!(rksc_exit_rows_params, rule) - 28usize];
    ["Offset of field: rksc_exit_rows_params::every"][::core::mem::offset_of!(rksc_exit_rows_params, every) - 32usize];
    ["Offset of field: rksc_exit_rows_params::offset"]
        [::core::mem::offset_of!(rksc_exit_rows_params, offset) - 36usize];
    ["Offset of field: rksc_exit_rows_params::tau"][::core::mem::offset_of!(rksc_exit_rows_params, tau) - 40usize];
    ["Offset of field: rksc_exit_rows_params::share"][::core::mem::offset_of!(rksc_exit_rows_params, share) - 44usize];
    ["Offset of field: rksc_exit_rows_params::whole_batch"]
        [::core::mem::offset_of!(rksc_exit_rows_params, whole_batch) - 48usize];
    ["Offset of field: rksc_exit_rows_params::layer"][::core::mem::offset_of!(rksc_exit_rows_params, layer) - 52usize];
};
impl Default for rksc_exit_rows_params {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rksc_linear_params {
    pub x: *const ::core::ffi::c_void,
    pub w: *const ::core::ffi::c_void,
    pub bias: *const f32,
    pub y: *mut f32,
    pub workspace: *mut ::core::ffi::c_void,
    pub route: *const f32,
    pub num_rows: u32,
    pub in_features: u32,
    pub out_features: u32,
    pub dtype: u32,
    pub y_stride: u32,
    pub layer: u32,
    pub side: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_linear_params"][::core::mem::size_of::<rksc_linear_params>() - 80usize];
    ["Alignment of rksc_linear_params"][::core::mem::align_of::<rksc_linear_params>() - 8usize];
    ["Offset of field: rksc_linear_params::x"][::core::mem::offset_of!(rksc_linear_params, x) - 0usize];
    ["Offset of field: rksc_linear_params::w"][::core::mem::offset_of!(rksc_linear_params, w) - 8usize];
    ["Offset of field: rksc_linear_params::bias"][::core::mem::offset_of!(rksc_linear_params, bias) - 16usize];
    ["Offset of field: rksc_linear_params::y"][::core::mem::offset_of!(rksc_linear_params, y) - 24usize];
    ["Offset of field: rksc_linear_params::workspace"]
        [::core::mem::offset_of!(rksc_linear_params, workspace) - 32usize];
    ["Offset of field: rksc_linear_params::route"][::core::mem::offset_of!(rksc_linear_params, route) - 40usize];
    ["Offset of field: rksc_linear_params::num_rows"][::core::mem::offset_of!(rksc_linear_params, num_rows) - 48usize];
    ["Offset of field: rksc_linear_params::in_features"]
        [::core::mem::offset_of!(rksc_linear_params, in_features) - 52usize];
    ["Offset of field: rksc_linear_params::out_features"]
        [::core::mem::offset_of!(rksc_linear_params, out_features) - 56usize];
    ["Offset of field: rksc_linear_params::dtype"][::core::mem::offset_of!(rksc_linear_params, dtype) - 60usize];
    ["Offset of field: rksc_linear_params::y_stride"][::core::mem::offset_of!(rksc_linear_params, y_stride) - 64usize];
    ["Offset of field: rksc_linear_params::layer"][::core::mem::offset_of!(rksc_linear_params, layer) - 68usize];
    ["Offset of field: rksc_linear_params::side"][::core::mem::offset_of!(rksc_linear_params, side) - 72usize];
    ["Offset of field: rksc_linear_params::reserved"][::core::mem::offset_of!(rksc_linear_params, reserved) - 76usize];
};
impl Default for rksc_linear_params {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
pub const RKSC_ZERO_NONE: rksc_zero = 0;
pub const RKSC_ZERO_INTEGER: rksc_zero = 1;
pub const RKSC_ZERO_FRACTIONAL: rksc_zero = 2;
pub type rksc_zero = ::core::ffi::c_uint;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rksc_linear_w4_params {
    pub x: *const ::core::ffi::c_void,
    pub codes: *const u32,
    pub scales: *const u16,
    pub zeros: *const ::core::ffi::c_void,
    pub bias: *const f32,
    pub y: *mut f32,
    pub workspace: *mut ::core::ffi::c_void,
    pub route: *const f32,
    pub num_rows: u32,
    pub in_features: u32,
    pub out_features: u32,
    pub group_size: u32,
    pub zero_kind: u32,
    pub dtype: u32,
    pub y_stride: u32,
    pub layer: u32,
    pub side: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_linear_w4_params"][::core::mem::size_of::<rksc_linear_w4_params>() - 104usize];
    ["Alignment of rksc_linear_w4_params"][::core::mem::align_of::<rksc_linear_w4_params>() - 8usize];
    ["Offset of field: rksc_linear_w4_params::x"][::core::mem::offset_of!(rksc_linear_w4_params, x) - 0usize];
    ["Offset of field: rksc_linear_w4_params::codes"][::core::mem::offset_of!(rksc_linear_w4_params, codes) - 8usize];
    ["Offset of field: rksc_linear_w4_params::scales"]
        [::core::mem::offset_of!(rksc_linear_w4_params, scales) - 16usize];
    ["Offset of field: rksc_linear_w4_params::zeros"][::core::mem::offset_of!(rksc_linear_w4_params, zeros) - 24usize];
    ["Offset of field: rksc_linear_w4_params::bias"][::core::mem::offset_of!(rksc_linear_w4_params, bias) - 32usize];
    ["Offset of field: rksc_linear_w4_params::y"][::core::mem::offset_of!(rksc_linear_w4_params, y) - 40usize];
    ["Offset of field: rksc_linear_w4_params::workspace"]
        [::core::mem::offset_of!(rksc_linear_w4_params, workspace) - 48usize];
    ["Offset of field: rksc_linear_w4_params::route"][::core::mem::offset_of!(rksc_linear_w4_params, route) - 56usize];
    ["Offset of field: rksc_linear_w4_params::num_rows"]
        [::core::mem::offset_of!(rksc_linear_w4_params, num_rows) - 64usize];
    ["Offset of field: rksc_linear_w4_params::in_features"]
        [::core::mem::offset_of!(rksc_linear_w4_params, in_features) - 68usize];
    ["Offset of field: rksc_linear_w4_params::out_features"]
        [::core::mem::offset_of!(rksc_linear_w4_params, out_features) - 72usize];
    ["Offset of field: rksc_linear_w4_params::group_size"]
        [::core::mem::offset_of!(rksc_linear_w4_params, group_size) - 76usize];
    ["Offset of field: rksc_linear_w4_params::zero_kind"]
        [::core::mem::offset_of!(rksc_linear_w4_params, zero_kind) - 80usize];
    ["Offset of field: rksc_linear_w4_params::dtype"][::core::mem::offset_of!(rksc_linear_w4_params, dtype) - 84usize];
    ["Offset of field: rksc_linear_w4_params::y_stride"]
        [::core::mem::offset_of!(rksc_linear_w4_params, y_stride) - 88usize];
    ["Offset of field: rksc_linear_w4_params::layer"][::core::mem::offset_of!(rksc_linear_w4_params, layer) - 92usize];
    ["Offset of field: rksc_linear_w4_params::side"][::core::mem::offset_of!(rksc_linear_w4_params, side) - 96usize];
    ["Offset of field: rksc_linear_w4_params::reserved"]
        [::core::mem::offset_of!(rksc_linear_w4_params, reserved) - 100usize];
};
impl Default for rksc_linear_w4_params {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
pub const RKSC_NUMBER_INTEGER: rksc_number = 0;
pub const RKSC_NUMBER_E4M3: rksc_number = 1;
pub type rksc_number = ::core::ffi::c_uint;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rksc_linear_w8_params {
    pub x: *const ::core::ffi::c_void,
    pub codes: *const u32,
    pub scales: *const ::core::ffi::c_void,
    pub bias: *const f32,
    pub y: *mut f32,
    pub workspace: *mut ::core::ffi::c_void,
    pub route: *const f32,
    pub num_rows: u32,
    pub in_features: u32,
    pub out_features: u32,
    pub group_size: u32,
    pub number: u32,
    pub dtype: u32,
    pub y_stride: u32,
    pub layer: u32,
    pub side: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_linear_w8_params"][::core::mem::size_of::<rksc_linear_w8_params>() - 96usize];
    ["Alignment of rksc_linear_w8_params"][::core::mem::align_of::<rksc_linear_w8_params>() - 8usize];
    ["Offset of field: rksc_linear_w8_params::x"][::core::mem::offset_of!(rksc_linear_w8_params, x) - 0usize];
    ["Offset of field: rksc_linear_w8_params::codes"][::core::mem::offset_of!(rksc_linear_w8_params, codes) - 8usize];
    ["Offset of field: rksc_linear_w8_params::scales"]
        [::core::mem::offset_of!(rksc_linear_w8_params, scales) - 16usize];
    ["Offset of field: rksc_linear_w8_params::bias"][::core::mem::offset_of!(rksc_linear_w8_params, bias) - 24usize];
    ["Offset of field: rksc_linear_w8_params::y"][::core::mem::offset_of!(rksc_linear_w8_params, y) - 32usize];
    ["Offset of field: rksc_linear_w8_params::workspace"]
        [::core::mem::offset_of!(rksc_linear_w8_params, workspace) - 40usize];
    ["Offset of field: rksc_linear_w8_params::route"][::core::mem::offset_of!(rksc_linear_w8_params, route) - 48usize];
    ["Offset of field: rksc_linear_w8_params::num_rows"]
        [::core::mem::offset_of!(rksc_linear_w8_params, num_rows) - 56usize];
    ["Offset of field: rksc_linear_w8_params::in_features"]
        [::core::mem::offset_of!(rksc_linear_w8_params, in_features) - 60usize];
    ["Offset of field: rksc_linear_w8_params::out_features"]
        [::core::mem::offset_of!(rksc_linear_w8_params, out_features) - 64usize];
    ["Offset of field: rksc_linear_w8_params::group_size"]
        [::core::mem::offset_of!(rksc_linear_w8_params, group_size) - 68usize];
    ["Offset of field: rksc_linear_w8_params::number"]
        [::core::mem::offset_of!(rksc_linear_w8_params, number) - 72usize];
    ["Offset of field: rksc_linear_w8_params::dtype"][::core::mem::offset_of!(rksc_linear_w8_params, dtype) - 76usize];
    ["Offset of field: rksc_linear_w8_params::y_stride"]
        [::core::mem::offset_of!(rksc_linear_w8_params, y_stride) - 80usize];
    ["Offset of field: rksc_linear_w8_params::layer"][::core::mem::offset_of!(rksc_linear_w8_params, layer) - 84usize];
    ["Offset of field: rksc_linear_w8_params::side"][::core::mem::offset_of!(rksc_linear_w8_params, side) - 88usize];
    ["Offset of field: rksc_linear_w8_params::reserved"]
        [::core::mem::offset_of!(rksc_linear_w8_params, reserved) - 92usize];
};
impl Default for rksc_linear_w8_params {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rksc_gather_columns_params {
    pub src: *const ::core::ffi::c_void,
    pub columns: *const u32,
    pub dst: *mut ::core::ffi::c_void,
    pub num_rows: u32,
    pub width: u32,
    pub dtype: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_gather_columns_params"][::core::mem::size_of::<rksc_gather_columns_params>() - 40usize];
    ["Alignment of rksc_gather_columns_params"][::core::mem::align_of::<rksc_gather_columns_params>() - 8usize];
    ["Offset of field: rksc_gather_columns_params::src"]
        [::core::mem::offset_of!(rksc_gather_columns_params, src) - 0usize];
    ["Offset of field: rksc_gather_columns_params::columns"]
        [::core::mem::offset_of!(rksc_gather_columns_params, columns) - 8usize];
    ["Offset of field: rksc_gather_columns_params::dst"]
        [::core::mem::offset_of!(rksc_gather_columns_params, dst) - 16usize];
    ["Offset of field: rksc_gather_columns_params::num_rows"]
        [::core::mem::offset_of!(rksc_gather_columns_params, num_rows) - 24usize];
    ["Offset of field: rksc_gather_columns_params::width"]
        [::core::mem::offset_of!(rksc_gather_columns_params, width) - 28usize];
    ["Offset of field: rksc_gather_columns_params::dtype"]
        [::core::mem::offset_of!(rksc_gather_columns_params, dtype) - 32usize];
    ["Offset of field: rksc_gather_columns_params::reserved"]
        [::core::mem::offset_of!(rksc_gather_columns_params, reserved) - 36usize];
};
impl Default for rksc_gather_columns_params {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
pub const RKSC_NORM_HEAD: rksc_norm_span = 0;
pub const RKSC_NORM_ROW: rksc_norm_span = 1;
pub type rksc_norm_span = ::core::ffi::c_uint;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rksc_rope_append_params {
    pub qkv: *const f32,
    pub q: *mut ::core::ffi::c_void,
    pub query_ring: *mut ::core::ffi::c_void,
    pub k_cache: *mut ::core::ffi::c_void,
    pub v_cache: *mut ::core::ffi::c_void,
    pub positions: *const u32,
    pub slots: *const u32,
    pub ring_rows: *const u32,
    pub inv_freq: *const f32,
    pub q_norm: *const f32,
    pub k_norm: *const f32,
    pub num_rows: u32,
    pub num_q_heads: u32,
    pub num_kv_heads: u32,
    pub head_dim: u32,
    pub rotary_dim: u32,
    pub block_size: u32,
    pub dtype: u32,
    pub norm_span: u32,
    pub rope_scale: f32,
    pub norm_eps: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_rope_append_params"][::core::mem::size_of::<rksc_rope_append_params>() - 128usize];
    ["Alignment of rksc_rope_append_params"][::core::mem::align_of::<rksc_rope_append_params>() - 8usize];
    ["Offset of field: rksc_rope_append_params::qkv"][::core::mem::offset_of!(rksc_rope_append_params, qkv) - 0usize];
    ["Offset of field: rksc_rope_append_params::q"][::core::mem::offset_of!(rksc_rope_append_params, q) - 8usize];
    ["Offset of field: rksc_rope_append_params::query_ring"]
        [::core::mem::offset_of!(rksc_rope_append_params, query_ring) - 16usize];
    ["Offset of field: rksc_rope_append_params::k_cache"]
        [::core::mem::offset_of!(rksc_rope_append_params, k_cache) - 24usize];
    ["Offset of field: rksc_rope_append_params::v_cache"]
        [::core::mem::offset_of!(rksc_rope_append_params, v_cache) - 32usize];
    ["Offset of field: rksc_rope_append_params::positions"]
        [::core::mem::offset_of!(rksc_rope_append_params, positions) - 40usize];
    ["Offset of field: rksc_rope_append_params::slots"]
        [::core::mem::offset_of!(rksc_rope_append_params, slots) - 48usize];
    ["Offset of field: rksc_rope_append_params::ring_rows"]
        [::core::mem::offset_of!(rksc_rope_append_params, ring_rows) - 56usize];
    ["Offset of field: rksc_rope_append_params::inv_freq"]
        [::core::mem::offset_of!(rksc_rope_append_params, inv_freq) - 64usize];
    ["Offset of field: rksc_rope_append_params::q_norm"]
        [::core::mem::offset_of!(rksc_rope_append_params, q_norm) - 72usize];
    ["Offset of field: rksc_rope_append_params::k_norm"]
        [::core::mem::offset_of!(rksc_rope_append_params, k_norm) - 80usize];
    ["Offset of field: rksc_rope_append_params::num_rows"]
        [::core::mem::offset_of!(rksc_rope_append_params, num_rows) - 88usize];
    ["Offset of field: rksc_rope_append_params::num_q_heads"]
        [::core::mem::offset_of!(rksc_rope_append_params, num_q_heads) - 92usize];
    ["Offset of field: rksc_rope_append_params::num_kv_heads"]
        [::core::mem::offset_of!(rksc_rope_append_params, num_kv_heads) - 96usize];
    ["Offset of field: rksc_rope_append_params::head_dim"]
        [::core::mem::offset_of!(rksc_rope_append_params, head_dim) - 100usize];
    ["Offset of field: rksc_rope_append_params::rotary_dim"]
        [::core::mem::offset_of!(rksc_rope_append_params, rotary_dim) - 104usize];
    ["Offset of field: rksc_rope_append_params::block_size"]
        [::core::mem::offset_of!(rksc_rope_append_params, block_size) - 108usize];
    ["Offset of field: rksc_rope_append_params::dtype"]
        [::core::mem::offset_of!(rksc_rope_append_params, dtype) - 112usize];
    ["Offset of field: rksc_rope_append_params::norm_span"]
        [::core::mem::offset_of!(rksc_rope_append_params, norm_span) - 116usize];
    ["Offset of field: rksc_rope_append_params::rope_scale"]
        [::core::mem::offset_of!(rksc_rope_append_params, rope_scale) - 120usize];
    ["Offset of field: rksc_rope_append_params::norm_eps"]
        [::core::mem::offset_of!(rksc_rope_append_params, norm_eps) - 124usize];
};
impl Default for rksc_rope_append_params {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, :: bytemuck :: Zeroable, :: bytemuck :: Pod)]
pub struct rksc_block_copy {
    pub src: u32,
    pub dst: u32,
    pub num_slots: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_block_copy"][::core::mem::size_of::<rksc_block_copy>() - 12usize];
    ["Alignment of rksc_block_copy"][::core::mem::align_of::<rksc_block_copy>() - 4usize];
    ["Offset of field: rksc_block_copy::src"][::core::mem::offset_of!(rksc_block_copy, src) - 0usize];
    ["Offset of field: rksc_block_copy::dst"][::core::mem::offset_of!(rksc_block_copy, dst) - 4usize];
    ["Offset of field: rksc_block_copy::num_slots"][::core::mem::offset_of!(rksc_block_copy, num_slots) - 8usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rksc_kv_copy_blocks_params {
    pub copies: *const rksc_block_copy,
    pub k_cache: *mut ::core::ffi::c_void,
    pub v_cache: *mut ::core::ffi::c_void,
    pub num_copies: u32,
    pub num_kv_heads: u32,
    pub block_size: u32,
    pub head_dim: u32,
    pub dtype: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_kv_copy_blocks_params"][::core::mem::size_of::<rksc_kv_copy_blocks_params>() - 48usize];
    ["Alignment of rksc_kv_copy_blocks_params"][::core::mem::align_of::<rksc_kv_copy_blocks_params>() - 8usize];
    ["Offset of field: rksc_kv_copy_blocks_params::copies"]
        [::core::mem::offset_of!(rksc_kv_copy_blocks_params, copies) - 0usize];
    ["Offset of field: rksc_kv_copy_blocks_params::k_cache"]
        [::core::mem::offset_of!(rksc_kv_copy_blocks_params, k_cache) - 8usize];
    ["Offset of field: rksc_kv_copy_blocks_params::v_cache"]
        [::core::mem::offset_of!(rksc_kv_copy_blocks_params, v_cache) - 16usize];
    ["Offset of field: rksc_kv_copy_blocks_params::num_copies"]
        [::core::mem::offset_of!(rksc_kv_copy_blocks_params, num_copies) - 24usize];
    ["Offset of field: rksc_kv_copy_blocks_params::num_kv_heads"]
        [::core::mem::offset_of!(rksc_kv_copy_blocks_params, num_kv_heads) - 28usize];
    ["Offset of field: rksc_kv_copy_blocks_params::block_size"]
        [::core::mem::offset_of!(rksc_kv_copy_blocks_params, block_size) - 32usize];
    ["Offset of field: rksc_kv_copy_blocks_params::head_dim"]
        [::core::mem::offset_of!(rksc_kv_copy_blocks_params, head_dim) - 36usize];
    ["Offset of field: rksc_kv_copy_blocks_params::dtype"]
        [::core::mem::offset_of!(rksc_kv_copy_blocks_params, dtype) - 40usize];
    ["Offset of field: rksc_kv_copy_blocks_params::reserved"]
        [::core::mem::offset_of!(rksc_kv_copy_blocks_params, reserved) - 44usize];
};
impl Default for rksc_kv_copy_blocks_params {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, :: bytemuck :: Zeroable, :: bytemuck :: Pod)]
pub struct rksc_slot_transfer {
    pub src: u32,
    pub dst: u32,
    pub shift: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_slot_transfer"][::core::mem::size_of::<rksc_slot_transfer>() - 12usize];
    ["Alignment of rksc_slot_transfer"][::core::mem::align_of::<rksc_slot_transfer>() - 4usize];
    ["Offset of field: rksc_slot_transfer::src"][::core::mem::offset_of!(rksc_slot_transfer, src) - 0usize];
    ["Offset of field: rksc_slot_transfer::dst"][::core::mem::offset_of!(rksc_slot_transfer, dst) - 4usize];
    ["Offset of field: rksc_slot_transfer::shift"][::core::mem::offset_of!(rksc_slot_transfer, shift) - 8usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rksc_kv_transfer_params {
    pub transfers: *const rksc_slot_transfer,
    pub k_cache: *mut ::core::ffi::c_void,
    pub v_cache: *mut ::core::ffi::c_void,
    pub inv_freq: *const f32,
    pub num_transfers: u32,
    pub num_kv_heads: u32,
    pub block_size: u32,
    pub head_dim: u32,
    pub rotary_dim: u32,
    pub dtype: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_kv_transfer_params"][::core::mem::size_of::<rksc_kv_transfer_params>() - 56usize];
    ["Alignment of rksc_kv_transfer_params"][::core::mem::align_of::<rksc_kv_transfer_params>() - 8usize];
    ["Offset of field: rksc_kv_transfer_params::transfers"]
        [::core::mem::offset_of!(rksc_kv_transfer_params, transfers) - 0usize];
    ["Offset of field: rksc_kv_transfer_params::k_cache"]
        [::core::mem::offset_of!(rksc_kv_transfer_params, k_cache) - 8usize];
    ["Offset of field: rksc_kv_transfer_params::v_cache"]
        [::core::mem::offset_of!(rksc_kv_transfer_params, v_cache) - 16usize];
    ["Offset of field: rksc_kv_transfer_params::inv_freq"]
        [::core::mem::offset_of!(rksc_kv_transfer_params, inv_freq) - 24usize];
    ["Offset of field: rksc_kv_transfer_params::num_transfers"]
        [::core::mem::offset_of!(rksc_kv_transfer_params, num_transfers) - 32usize];
    ["Offset of field: rksc_kv_transfer_params::num_kv_heads"]
        [::core::mem::offset_of!(rksc_kv_transfer_params, num_kv_heads) - 36usize];
    ["Offset of field: rksc_kv_transfer_params::block_size"]
        [::core::mem::offset_of!(rksc_kv_transfer_params, block_size) - 40usize];
    ["Offset of field: rksc_kv_transfer_params::head_dim"]
        [::core::mem::offset_of!(rksc_kv_transfer_params, head_dim) - 44usize];
    ["Offset of field: rksc_kv_transfer_params::rotary_dim"]
        [::core::mem::offset_of!(rksc_kv_transfer_params, rotary_dim) - 48usize];
    ["Offset of field: rksc_kv_transfer_params::dtype"]
        [::core::mem::offset_of!(rksc_kv_transfer_params, dtype) - 52usize];
};
impl Default for rksc_kv_transfer_params {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, :: bytemuck :: Zeroable, :: bytemuck :: Pod)]
pub struct rksc_attention_item {
    pub row_start: u32,
    pub num_rows: u32,
    pub slot_start: u32,
    pub num_slots: u32,
    pub block_start: u32,
    pub group: u32,
    pub partial_start: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_attention_item"][::core::mem::size_of::<rksc_attention_item>() - 28usize];
    ["Alignment of rksc_attention_item"][::core::mem::align_of::<rksc_attention_item>() - 4usize];
    ["Offset of field: rksc_attention_item::row_start"]
        [::core::mem::offset_of!(rksc_attention_item, row_start) - 0usize];
    ["Offset of field: rksc_attention_item::num_rows"][::core::mem::offset_of!(rksc_attention_item, num_rows) - 4usize];
    ["Offset of field: rksc_attention_item::slot_start"]
        [::core::mem::offset_of!(rksc_attention_item, slot_start) - 8usize];
    ["Offset of field: rksc_attention_item::num_slots"]
        [::core::mem::offset_of!(rksc_attention_item, num_slots) - 12usize];
    ["Offset of field: rksc_attention_item::block_start"]
        [::core::mem::offset_of!(rksc_attention_item, block_start) - 16usize];
    ["Offset of field: rksc_attention_item::group"][::core::mem::offset_of!(rksc_attention_item, group) - 20usize];
    ["Offset of field: rksc_attention_item::partial_start"]
        [::core::mem::offset_of!(rksc_attention_item, partial_start) - 24usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, :: bytemuck :: Zeroable, :: bytemuck :: Pod)]
pub struct rksc_attention_group {
    pub row_start: u32,
    pub num_rows: u32,
    pub item_start: u32,
    pub num_items: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_attention_group"][::core::mem::size_of::<rksc_attention_group>() - 16usize];
    ["Alignment of rksc_attention_group"][::core::mem::align_of::<rksc_attention_group>() - 4usize];
    ["Offset of field: rksc_attention_group::row_start"]
        [::core::mem::offset_of!(rksc_attention_group, row_start) - 0usize];
    ["Offset of field: rksc_attention_group::num_rows"]
        [::core::mem::offset_of!(rksc_attention_group, num_rows) - 4usize];
    ["Offset of field: rksc_attention_group::item_start"]
        [::core::mem::offset_of!(rksc_attention_group, item_start) - 8usize];
    ["Offset of field: rksc_attention_group::num_items"]
        [::core::mem::offset_of!(rksc_attention_group, num_items) - 12usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rksc_paged_attention_params {
    pub q: *const ::core::ffi::c_void,
    pub k_cache: *const ::core::ffi::c_void,
    pub v_cache: *const ::core::ffi::c_void,
    pub o: *mut ::core::ffi::c_void,
    pub lse: *mut f32,
    pub row_order: *const u32,
    pub kv_lens: *const u32,
    pub blocks: *const u32,
    pub items: *const rksc_attention_item,
    pub groups: *const rksc_attention_group,
    pub num_items: *const u32,
    pub partial_o: *mut f32,
    pub partial_ml: *mut f32,
    pub arrivals: *mut u32,
    pub max_items: u32,
    pub num_q_heads: u32,
    pub num_kv_heads: u32,
    pub head_dim: u32,
    pub block_size: u32,
    pub dtype: u32,
    pub sm_scale: f32,
    pub window: u32,
    pub softcap: f32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_paged_attention_params"][::core::mem::size_of::<rksc_paged_attention_params>() - 152usize];
    ["Alignment of rksc_paged_attention_params"][::core::mem::align_of::<rksc_paged_attention_params>() - 8usize];
    ["Offset of field: rksc_paged_attention_params::q"]
        [::core::mem::offset_of!(rksc_paged_attention_params, q) - 0usize];
    ["Offset of field: rksc_paged_attention_params::k_cache"]
        [::core::mem::offset_of!(rksc_paged_attention_params, k_cache) - 8usize];
    ["Offset of field: rksc_paged_attention_params::v_cache"]
        [::core::mem::offset_of!(rksc_paged_attention_params, v_cache) - 16usize];
    ["Offset of field: rksc_paged_attention_params::o"]
        [::core::mem::offset_of!(rksc_paged_attention_params, o) - 24usize];
    ["Offset of field: rksc_paged_attention_params::lse"]
        [::core::mem::offset_of!(rksc_paged_attention_params, lse) - 32usize];
    ["Offset of field: rksc_paged_attention_params::row_order"]
        [::core::mem::offset_of!(rksc_paged_attention_params, row_order) - 40usize];
    ["Offset of field: rksc_paged_attention_params::kv_lens"]
        [::core::mem::offset_of!(rksc_paged_attention_params, kv_lens) - 48usize];
    ["Offset of field: rksc_paged_attention_params::blocks"]
        [::core::mem::offset_of!(rksc_paged_attention_params, blocks) - 56usize];
    ["Offset of field: rksc_paged_attention_params::items"]
        [::core::mem::offset_of!(rksc_paged_attention_params, items) - 64usize];
    ["Offset of field: rksc_paged_attention_params::groups"]
        [::core::mem::offset_of!(rksc_paged_attention_params, groups) - 72usize];
    ["Offset of field: rksc_paged_attention_params::num_items"]
        [::core::mem::offset_of!(rksc_paged_attention_params, num_items) - 80usize];
    ["Offset of field: rksc_paged_attention_params::partial_o"]
        [::core::mem::offset_of!(rksc_paged_attention_params, partial_o) - 88usize];
    ["Offset of field: rksc_paged_attention_params::partial_ml"]
        [::core::mem::offset_of!(rksc_paged_attention_params, partial_ml) - 96usize];
    ["Offset of field: rksc_paged_attention_params::arrivals"]
        [::core::mem::offset_of!(rksc_paged_attention_params, arrivals) - 104usize];
    ["Offset of field: rksc_paged_attention_params::max_items"]
        [::core::mem::offset_of!(rksc_paged_attention_params, max_items) - 112usize];
    ["Offset of field: rksc_paged_attention_params::num_q_heads"]
        [::core::mem::offset_of!(rksc_paged_attention_params, num_q_heads) - 116usize];
    ["Offset of field: rksc_paged_attention_params::num_kv_heads"]
        [::core::mem::offset_of!(rksc_paged_attention_params, num_kv_heads) - 120usize];
    ["Offset of field: rksc_paged_attention_params::head_dim"]
        [::core::mem::offset_of!(rksc_paged_attention_params, head_dim) - 124usize];
    ["Offset of field: rksc_paged_attention_params::block_size"]
        [::core::mem::offset_of!(rksc_paged_attention_params, block_size) - 128usize];
    ["Offset of field: rksc_paged_attention_params::dtype"]
        [::core::mem::offset_of!(rksc_paged_attention_params, dtype) - 132usize];
    ["Offset of field: rksc_paged_attention_params::sm_scale"]
        [::core::mem::offset_of!(rksc_paged_attention_params, sm_scale) - 136usize];
    ["Offset of field: rksc_paged_attention_params::window"]
        [::core::mem::offset_of!(rksc_paged_attention_params, window) - 140usize];
    ["Offset of field: rksc_paged_attention_params::softcap"]
        [::core::mem::offset_of!(rksc_paged_attention_params, softcap) - 144usize];
    ["Offset of field: rksc_paged_attention_params::reserved"]
        [::core::mem::offset_of!(rksc_paged_attention_params, reserved) - 148usize];
};
impl Default for rksc_paged_attention_params {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, :: bytemuck :: Zeroable, :: bytemuck :: Pod)]
pub struct rksc_mass_sequence {
    pub row_start: u32,
    pub num_rows: u32,
    pub block_start: u32,
    pub kv_len: u32,
    pub mass_start: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_mass_sequence"][::core::mem::size_of::<rksc_mass_sequence>() - 20usize];
    ["Alignment of rksc_mass_sequence"][::core::mem::align_of::<rksc_mass_sequence>() - 4usize];
    ["Offset of field: rksc_mass_sequence::row_start"][::core::mem::offset_of!(rksc_mass_sequence, row_start) - 0usize];
    ["Offset of field: rksc_mass_sequence::num_rows"][::core::mem::offset_of!(rksc_mass_sequence, num_rows) - 4usize];
    ["Offset of field: rksc_mass_sequence::block_start"]
        [::core::mem::offset_of!(rksc_mass_sequence, block_start) - 8usize];
    ["Offset of field: rksc_mass_sequence::kv_len"][::core::mem::offset_of!(rksc_mass_sequence, kv_len) - 12usize];
    ["Offset of field: rksc_mass_sequence::mass_start"]
        [::core::mem::offset_of!(rksc_mass_sequence, mass_start) - 16usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rksc_attention_mass_params {
    pub q: *const ::core::ffi::c_void,
    pub k_cache: *const ::core::ffi::c_void,
    pub lse: *const f32,
    pub blocks: *const u32,
    pub sequences: *const rksc_mass_sequence,
    pub mass: *mut f32,
    pub num_sequences: u32,
    pub max_kv_len: u32,
    pub num_q_heads: u32,
    pub num_kv_heads: u32,
    pub head_dim: u32,
    pub block_size: u32,
    pub dtype: u32,
    pub sm_scale: f32,
    pub window: u32,
    pub softcap: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_attention_mass_params"][::core::mem::size_of::<rksc_attention_mass_params>() - 88usize];
    ["Alignment of rksc_attention_mass_params"][::core::mem::align_of::<rksc_attention_mass_params>() - 8usize];
    ["Offset of field: rksc_attention_mass_params::q"][::core::mem::offset_of!(rksc_attention_mass_params, q) - 0usize];
    ["Offset of field: rksc_attention_mass_params::k_cache"]
        [::core::mem::offset_of!(rksc_attention_mass_params, k_cache) - 8usize];
    ["Offset of field: rksc_attention_mass_params::lse"]
        [::core::mem::offset_of!(rksc_attention_mass_params, lse) - 16usize];
    ["Offset of field: rksc_attention_mass_params::blocks"]
        [::core::mem::offset_of!(rksc_attention_mass_params, blocks) - 24usize];
    ["Offset of field: rksc_attention_mass_params::sequences"]
        [::core::mem::offset_of!(rksc_attention_mass_params, sequences) - 32usize];
    ["Offset of field: rksc_attention_mass_params::mass"]
        [::core::mem::offset_of!(rksc_attention_mass_params, mass) - 40usize];
    ["Offset of field: rksc_attention_mass_params::num_sequences"]
        [::core::mem::offset_of!(rksc_attention_mass_params, num_sequences) - 48usize];
    ["Offset of field: rksc_attention_mass_params::max_kv_len"]
        [::core::mem::offset_of!(rksc_attention_mass_params, max_kv_len) - 52usize];
    ["Offset of field: rksc_attention_mass_params::num_q_heads"]
        [::core::mem::offset_of!(rksc_attention_mass_params, num_q_heads) - 56usize];
    ["Offset of field: rksc_attention_mass_params::num_kv_heads"]
        [::core::mem::offset_of!(rksc_attention_mass_params, num_kv_heads) - 60usize];
    ["Offset of field: rksc_attention_mass_params::head_dim"]
        [::core::mem::offset_of!(rksc_attention_mass_params, head_dim) - 64usize];
    ["Offset of field: rksc_attention_mass_params::block_size"]
        [::core::mem::offset_of!(rksc_attention_mass_params, block_size) - 68usize];
    ["Offset of field: rksc_attention_mass_params::dtype"]
        [::core::mem::offset_of!(rksc_attention_mass_params, dtype) - 72usize];
    ["Offset of field: rksc_attention_mass_params::sm_scale"]
        [::core::mem::offset_of!(rksc_attention_mass_params, sm_scale) - 76usize];
    ["Offset of field: rksc_attention_mass_params::window"]
        [::core::mem::offset_of!(rksc_attention_mass_params, window) - 80usize];
    ["Offset of field: rksc_attention_mass_params::softcap"]
        [::core::mem::offset_of!(rksc_attention_mass_params, softcap) - 84usize];
};
impl Default for rksc_attention_mass_params {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
pub const RKSC_SILU: rksc_activation = 0;
pub const RKSC_GELU_TANH: rksc_activation = 1;
pub type rksc_activation = ::core::ffi::c_uint;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rksc_glu_params {
    pub gate_up: *const f32,
    pub y: *mut ::core::ffi::c_void,
    pub num_rows: u32,
    pub intermediate: u32,
    pub activation: u32,
    pub dtype: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_glu_params"][::core::mem::size_of::<rksc_glu_params>() - 32usize];
    ["Alignment of rksc_glu_params"][::core::mem::align_of::<rksc_glu_params>() - 8usize];
    ["Offset of field: rksc_glu_params::gate_up"][::core::mem::offset_of!(rksc_glu_params, gate_up) - 0usize];
    ["Offset of field: rksc_glu_params::y"][::core::mem::offset_of!(rksc_glu_params, y) - 8usize];
    ["Offset of field: rksc_glu_params::num_rows"][::core::mem::offset_of!(rksc_glu_params, num_rows) - 16usize];
    ["Offset of field: rksc_glu_params::intermediate"]
        [::core::mem::offset_of!(rksc_glu_params, intermediate) - 20usize];
    ["Offset of field: rksc_glu_params::activation"][::core::mem::offset_of!(rksc_glu_params, activation) - 24usize];
    ["Offset of field: rksc_glu_params::dtype"][::core::mem::offset_of!(rksc_glu_params, dtype) - 28usize];
};
impl Default for rksc_glu_params {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rksc_gather_rows_params {
    pub rows: *const u32,
    pub src: *const f32,
    pub dst: *mut f32,
    pub num_rows: u32,
    pub width: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_gather_rows_params"][::core::mem::size_of::<rksc_gather_rows_params>() - 32usize];
    ["Alignment of rksc_gather_rows_params"][::core::mem::align_of::<rksc_gather_rows_params>() - 8usize];
    ["Offset of field: rksc_gather_rows_params::rows"][::core::mem::offset_of!(rksc_gather_rows_params, rows) - 0usize];
    ["Offset of field: rksc_gather_rows_params::src"][::core::mem::offset_of!(rksc_gather_rows_params, src) - 8usize];
    ["Offset of field: rksc_gather_rows_params::dst"][::core::mem::offset_of!(rksc_gather_rows_params, dst) - 16usize];
    ["Offset of field: rksc_gather_rows_params::num_rows"]
        [::core::mem::offset_of!(rksc_gather_rows_params, num_rows) - 24usize];
    ["Offset of field: rksc_gather_rows_params::width"]
        [::core::mem::offset_of!(rksc_gather_rows_params, width) - 28usize];
};
impl Default for rksc_gather_rows_params {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rksc_softcap_params {
    pub logits: *mut f32,
    pub num_rows: u32,
    pub vocab: u32,
    pub cap: f32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_softcap_params"][::core::mem::size_of::<rksc_softcap_params>() - 24usize];
    ["Alignment of rksc_softcap_params"][::core::mem::align_of::<rksc_softcap_params>() - 8usize];
    ["Offset of field: rksc_softcap_params::logits"][::core::mem::offset_of!(rksc_softcap_params, logits) - 0usize];
    ["Offset of field: rksc_softcap_params::num_rows"][::core::mem::offset_of!(rksc_softcap_params, num_rows) - 8usize];
    ["Offset of field: rksc_softcap_params::vocab"][::core::mem::offset_of!(rksc_softcap_params, vocab) - 12usize];
    ["Offset of field: rksc_softcap_params::cap"][::core::mem::offset_of!(rksc_softcap_params, cap) - 16usize];
    ["Offset of field: rksc_softcap_params::reserved"]
        [::core::mem::offset_of!(rksc_softcap_params, reserved) - 20usize];
};
impl Default for rksc_softcap_params {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, :: bytemuck :: Zeroable, :: bytemuck :: Pod)]
pub struct rksc_statistics {
    pub argmax: u32,
    pub max: f32,
    pub lse: f32,
    pub entropy: f32,
    pub top1: f32,
    pub margin: f32,
    pub finite: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_statistics"][::core::mem::size_of::<rksc_statistics>() - 28usize];
    ["Alignment of rksc_statistics"][::core::mem::align_of::<rksc_statistics>() - 4usize];
    ["Offset of field: rksc_statistics::argmax"][::core::mem::offset_of!(rksc_statistics, argmax) - 0usize];
    ["Offset of field: rksc_statistics::max"][::core::mem::offset_of!(rksc_statistics, max) - 4usize];
    ["Offset of field: rksc_statistics::lse"][::core::mem::offset_of!(rksc_statistics, lse) - 8usize];
    ["Offset of field: rksc_statistics::entropy"][::core::mem::offset_of!(rksc_statistics, entropy) - 12usize];
    ["Offset of field: rksc_statistics::top1"][::core::mem::offset_of!(rksc_statistics, top1) - 16usize];
    ["Offset of field: rksc_statistics::margin"][::core::mem::offset_of!(rksc_statistics, margin) - 20usize];
    ["Offset of field: rksc_statistics::finite"][::core::mem::offset_of!(rksc_statistics, finite) - 24usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rksc_row_stats_params {
    pub logits: *const f32,
    pub stats: *mut rksc_statistics,
    pub workspace: *mut ::core::ffi::c_void,
    pub num_rows: u32,
    pub vocab: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_row_stats_params"][::core::mem::size_of::<rksc_row_stats_params>() - 32usize];
    ["Alignment of rksc_row_stats_params"][::core::mem::align_of::<rksc_row_stats_params>() - 8usize];
    ["Offset of field: rksc_row_stats_params::logits"][::core::mem::offset_of!(rksc_row_stats_params, logits) - 0usize];
    ["Offset of field: rksc_row_stats_params::stats"][::core::mem::offset_of!(rksc_row_stats_params, stats) - 8usize];
    ["Offset of field: rksc_row_stats_params::workspace"]
        [::core::mem::offset_of!(rksc_row_stats_params, workspace) - 16usize];
    ["Offset of field: rksc_row_stats_params::num_rows"]
        [::core::mem::offset_of!(rksc_row_stats_params, num_rows) - 24usize];
    ["Offset of field: rksc_row_stats_params::vocab"][::core::mem::offset_of!(rksc_row_stats_params, vocab) - 28usize];
};
impl Default for rksc_row_stats_params {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, :: bytemuck :: Zeroable, :: bytemuck :: Pod)]
pub struct rksc_sample_row {
    pub seed: u64,
    pub path: u64,
    pub position: u64,
    pub temperature: f32,
    pub top_p: f32,
    pub min_p: f32,
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub top_k: u32,
    pub history_start: u32,
    pub num_prompt: u32,
    pub num_generated: u32,
    pub bias_start: u32,
    pub num_bias: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_sample_row"][::core::mem::size_of::<rksc_sample_row>() - 72usize];
    ["Alignment of rksc_sample_row"][::core::mem::align_of::<rksc_sample_row>() - 8usize];
    ["Offset of field: rksc_sample_row::seed"][::core::mem::offset_of!(rksc_sample_row, seed) - 0usize];
    ["Offset of field: rksc_sample_row::path"][::core::mem::offset_of!(rksc_sample_row, path) - 8usize];
    ["Offset of field: rksc_sample_row::position"][::core::mem::offset_of!(rksc_sample_row, position) - 16usize];
    ["Offset of field: rksc_sample_row::temperature"][::core::mem::offset_of!(rksc_sample_row, temperature) - 24usize];
    ["Offset of field: rksc_sample_row::top_p"][::core::mem::offset_of!(rksc_sample_row, top_p) - 28usize];
    ["Offset of field: rksc_sample_row::min_p"][::core::mem::offset_of!(rksc_sample_row, min_p) - 32usize];
    ["Offset of field: rksc_sample_row::repetition_penalty"]
        [::core::mem::offset_of!(rksc_sample_row, repetition_penalty) - 36usize];
    ["Offset of field: rksc_sample_row::presence_penalty"]
        [::core::mem::offset_of!(rksc_sample_row, presence_penalty) - 40usize];
    ["Offset of field: rksc_sample_row::frequency_penalty"]
        [::core::mem::offset_of!(rksc_sample_row, frequency_penalty) - 44usize];
    ["Offset of field: rksc_sample_row::top_k"][::core::mem::offset_of!(rksc_sample_row, top_k) - 48usize];
    ["Offset of field: rksc_sample_row::history_start"]
        [::core::mem::offset_of!(rksc_sample_row, history_start) - 52usize];
    ["Offset of field: rksc_sample_row::num_prompt"][::core::mem::offset_of!(rksc_sample_row, num_prompt) - 56usize];
    ["Offset of field: rksc_sample_row::num_generated"]
        [::core::mem::offset_of!(rksc_sample_row, num_generated) - 60usize];
    ["Offset of field: rksc_sample_row::bias_start"][::core::mem::offset_of!(rksc_sample_row, bias_start) - 64usize];
    ["Offset of field: rksc_sample_row::num_bias"][::core::mem::offset_of!(rksc_sample_row, num_bias) - 68usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, :: bytemuck :: Zeroable, :: bytemuck :: Pod)]
pub struct rksc_sampled {
    pub token: u32,
    pub logit: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_sampled"][::core::mem::size_of::<rksc_sampled>() - 8usize];
    ["Alignment of rksc_sampled"][::core::mem::align_of::<rksc_sampled>() - 4usize];
    ["Offset of field: rksc_sampled::token"][::core::mem::offset_of!(rksc_sampled, token) - 0usize];
    ["Offset of field: rksc_sampled::logit"][::core::mem::offset_of!(rksc_sampled, logit) - 4usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rksc_sample_params {
    pub logits: *mut f32,
    pub rows: *const rksc_sample_row,
    pub history: *const u32,
    pub saved: *mut f32,
    pub sampled: *mut rksc_sampled,
    pub num_rows: u32,
    pub vocab: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_sample_params"][::core::mem::size_of::<rksc_sample_params>() - 48usize];
    ["Alignment of rksc_sample_params"][::core::mem::align_of::<rksc_sample_params>() - 8usize];
    ["Offset of field: rksc_sample_params::logits"][::core::mem::offset_of!(rksc_sample_params, logits) - 0usize];
    ["Offset of field: rksc_sample_params::rows"][::core::mem::offset_of!(rksc_sample_params, rows) - 8usize];
    ["Offset of field: rksc_sample_params::history"][::core::mem::offset_of!(rksc_sample_params, history) - 16usize];
    ["Offset of field: rksc_sample_params::saved"][::core::mem::offset_of!(rksc_sample_params, saved) - 24usize];
    ["Offset of field: rksc_sample_params::sampled"][::core::mem::offset_of!(rksc_sample_params, sampled) - 32usize];
    ["Offset of field: rksc_sample_params::num_rows"][::core::mem::offset_of!(rksc_sample_params, num_rows) - 40usize];
    ["Offset of field: rksc_sample_params::vocab"][::core::mem::offset_of!(rksc_sample_params, vocab) - 44usize];
};
impl Default for rksc_sample_params {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rksc_entropy_probe_params {
    pub x: *const f32,
    pub norm_weight: *const f32,
    pub w: *const ::core::ffi::c_void,
    pub candidates: *const u32,
    pub chosen: *const u32,
    pub stats: *mut rksc_statistics,
    pub chosen_logprob: *mut f32,
    pub workspace: *mut ::core::ffi::c_void,
    pub num_rows: u32,
    pub hidden: u32,
    pub vocab: u32,
    pub num_candidates: u32,
    pub dtype: u32,
    pub eps: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_entropy_probe_params"][::core::mem::size_of::<rksc_entropy_probe_params>() - 88usize];
    ["Alignment of rksc_entropy_probe_params"][::core::mem::align_of::<rksc_entropy_probe_params>() - 8usize];
    ["Offset of field: rksc_entropy_probe_params::x"][::core::mem::offset_of!(rksc_entropy_probe_params, x) - 0usize];
    ["Offset of field: rksc_entropy_probe_params::norm_weight"]
        [::core::mem::offset_of!(rksc_entropy_probe_params, norm_weight) - 8usize];
    ["Offset of field: rksc_entropy_probe_params::w"][::core::mem::offset_of!(rksc_entropy_probe_params, w) - 16usize];
    ["Offset of field: rksc_entropy_probe_params::candidates"]
        [::core::mem::offset_of!(rksc_entropy_probe_params, candidates) - 24usize];
    ["Offset of field: rksc_entropy_probe_params::chosen"]
        [::core::mem::offset_of!(rksc_entropy_probe_params, chosen) - 32usize];
    ["Offset of field: rksc_entropy_probe_params::stats"]
        [::core::mem::offset_of!(rksc_entropy_probe_params, stats) - 40usize];
    ["Offset of field: rksc_entropy_probe_params::chosen_logprob"]
        [::core::mem::offset_of!(rksc_entropy_probe_params, chosen_logprob) - 48usize];
    ["Offset of field: rksc_entropy_probe_params::workspace"]
        [::core::mem::offset_of!(rksc_entropy_probe_params, workspace) - 56usize];
    ["Offset of field: rksc_entropy_probe_params::num_rows"]
        [::core::mem::offset_of!(rksc_entropy_probe_params, num_rows) - 64usize];
    ["Offset of field: rksc_entropy_probe_params::hidden"]
        [::core::mem::offset_of!(rksc_entropy_probe_params, hidden) - 68usize];
    ["Offset of field: rksc_entropy_probe_params::vocab"]
        [::core::mem::offset_of!(rksc_entropy_probe_params, vocab) - 72usize];
    ["Offset of field: rksc_entropy_probe_params::num_candidates"]
        [::core::mem::offset_of!(rksc_entropy_probe_params, num_candidates) - 76usize];
    ["Offset of field: rksc_entropy_probe_params::dtype"]
        [::core::mem::offset_of!(rksc_entropy_probe_params, dtype) - 80usize];
    ["Offset of field: rksc_entropy_probe_params::eps"]
        [::core::mem::offset_of!(rksc_entropy_probe_params, eps) - 84usize];
};
impl Default for rksc_entropy_probe_params {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rksc_branch_similarity_params {
    pub states: *const f32,
    pub root: *const f32,
    pub layer_weights: *const f32,
    pub to_root: *mut f32,
    pub pairwise: *mut f32,
    pub above: *mut u32,
    pub labels: *mut u32,
    pub workspace: *mut ::core::ffi::c_void,
    pub num_layers: u32,
    pub num_branches: u32,
    pub hidden: u32,
    pub tau: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_branch_similarity_params"][::core::mem::size_of::<rksc_branch_similarity_params>() - 80usize];
    ["Alignment of rksc_branch_similarity_params"][::core::mem::align_of::<rksc_branch_similarity_params>() - 8usize];
    ["Offset of field: rksc_branch_similarity_params::states"]
        [::core::mem::offset_of!(rksc_branch_similarity_params, states) - 0usize];
    ["Offset of field: rksc_branch_similarity_params::root"]
        [::core::mem::offset_of!(rksc_branch_similarity_params, root) - 8usize];
    ["Offset of field: rksc_branch_similarity_params::layer_weights"]
        [::core::mem::offset_of!(rksc_branch_similarity_params, layer_weights) - 16usize];
    ["Offset of field: rksc_branch_similarity_params::to_root"]
        [::core::mem::offset_of!(rksc_branch_similarity_params, to_root) - 24usize];
    ["Offset of field: rksc_branch_similarity_params::pairwise"]
        [::core::mem::offset_of!(rksc_branch_similarity_params, pairwise) - 32usize];
    ["Offset of field: rksc_branch_similarity_params::above"]
        [::core::mem::offset_of!(rksc_branch_similarity_params, above) - 40usize];
    ["Offset of field: rksc_branch_similarity_params::labels"]
        [::core::mem::offset_of!(rksc_branch_similarity_params, labels) - 48usize];
    ["Offset of field: rksc_branch_similarity_params::workspace"]
        [::core::mem::offset_of!(rksc_branch_similarity_params, workspace) - 56usize];
    ["Offset of field: rksc_branch_similarity_params::num_layers"]
        [::core::mem::offset_of!(rksc_branch_similarity_params, num_layers) - 64usize];
    ["Offset of field: rksc_branch_similarity_params::num_branches"]
        [::core::mem::offset_of!(rksc_branch_similarity_params, num_branches) - 68usize];
    ["Offset of field: rksc_branch_similarity_params::hidden"]
        [::core::mem::offset_of!(rksc_branch_similarity_params, hidden) - 72usize];
    ["Offset of field: rksc_branch_similarity_params::tau"]
        [::core::mem::offset_of!(rksc_branch_similarity_params, tau) - 76usize];
};
impl Default for rksc_branch_similarity_params {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
pub const RKSC_KV_CODE: rksc_kv_variant = 0;
pub const RKSC_KV_TEXT: rksc_kv_variant = 1;
pub const RKSC_KV_ALG1: rksc_kv_variant = 2;
pub type rksc_kv_variant = ::core::ffi::c_uint;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rksc_kv_scores_params {
    pub queries: *const ::core::ffi::c_void,
    pub k_cache: *const ::core::ffi::c_void,
    pub blocks: *const u32,
    pub positions: *const u32,
    pub scores: *mut f32,
    pub importance: *mut f32,
    pub redundancy: *mut f32,
    pub workspace: *mut ::core::ffi::c_void,
    pub num_slots: u32,
    pub window: u32,
    pub num_queries: u32,
    pub pool_size: u32,
    pub variant: u32,
    pub num_q_heads: u32,
    pub num_kv_heads: u32,
    pub head_dim: u32,
    pub block_size: u32,
    pub dtype: u32,
    pub sm_scale: f32,
    pub lambda: f32,
    pub threshold: f32,
    pub position_stride: u32,
    pub softcap: f32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_kv_scores_params"][::core::mem::size_of::<rksc_kv_scores_params>() - 128usize];
    ["Alignment of rksc_kv_scores_params"][::core::mem::align_of::<rksc_kv_scores_params>() - 8usize];
    ["Offset of field: rksc_kv_scores_params::queries"]
        [::core::mem::offset_of!(rksc_kv_scores_params, queries) - 0usize];
    ["Offset of field: rksc_kv_scores_params::k_cache"]
        [::core::mem::offset_of!(rksc_kv_scores_params, k_cache) - 8usize];
    ["Offset of field: rksc_kv_scores_params::blocks"]
        [::core::mem::offset_of!(rksc_kv_scores_params, blocks) - 16usize];
    ["Offset of field: rksc_kv_scores_params::positions"]
        [::core::mem::offset_of!(rksc_kv_scores_params, positions) - 24usize];
    ["Offset of field: rksc_kv_scores_params::scores"]
        [::core::mem::offset_of!(rksc_kv_scores_params, scores) - 32usize];
    ["Offset of field: rksc_kv_scores_params::importance"]
        [::core::mem::offset_of!(rksc_kv_scores_params, importance) - 40usize];
    ["Offset of field: rksc_kv_scores_params::redundancy"]
        [::core::mem::offset_of!(rksc_kv_scores_params, redundancy) - 48usize];
    ["Offset of field: rksc_kv_scores_params::workspace"]
        [::core::mem::offset_of!(rksc_kv_scores_params, workspace) - 56usize];
    ["Offset of field: rksc_kv_scores_params::num_slots"]
        [::core::mem::offset_of!(rksc_kv_scores_params, num_slots) - 64usize];
    ["Offset of field: rksc_kv_scores_params::window"]
        [::core::mem::offset_of!(rksc_kv_scores_params, window) - 68usize];
    ["Offset of field: rksc_kv_scores_params::num_queries"]
        [::core::mem::offset_of!(rksc_kv_scores_params, num_queries) - 72usize];
    ["Offset of field: rksc_kv_scores_params::pool_size"]
        [::core::mem::offset_of!(rksc_kv_scores_params, pool_size) - 76usize];
    ["Offset of field: rksc_kv_scores_params::variant"]
        [::core::mem::offset_of!(rksc_kv_scores_params, variant) - 80usize];
    ["Offset of field: rksc_kv_scores_params::num_q_heads"]
        [::core::mem::offset_of!(rksc_kv_scores_params, num_q_heads) - 84usize];
    ["Offset of field: rksc_kv_scores_params::num_kv_heads"]
        [::core::mem::offset_of!(rksc_kv_scores_params, num_kv_heads) - 88usize];
    ["Offset of field: rksc_kv_scores_params::head_dim"]
        [::core::mem::offset_of!(rksc_kv_scores_params, head_dim) - 92usize];
    ["Offset of field: rksc_kv_scores_params::block_size"]
        [::core::mem::offset_of!(rksc_kv_scores_params, block_size) - 96usize];
    ["Offset of field: rksc_kv_scores_params::dtype"][::core::mem::offset_of!(rksc_kv_scores_params, dtype) - 100usize];
    ["Offset of field: rksc_kv_scores_params::sm_scale"]
        [::core::mem::offset_of!(rksc_kv_scores_params, sm_scale) - 104usize];
    ["Offset of field: rksc_kv_scores_params::lambda"]
        [::core::mem::offset_of!(rksc_kv_scores_params, lambda) - 108usize];
    ["Offset of field: rksc_kv_scores_params::threshold"]
        [::core::mem::offset_of!(rksc_kv_scores_params, threshold) - 112usize];
    ["Offset of field: rksc_kv_scores_params::position_stride"]
        [::core::mem::offset_of!(rksc_kv_scores_params, position_stride) - 116usize];
    ["Offset of field: rksc_kv_scores_params::softcap"]
        [::core::mem::offset_of!(rksc_kv_scores_params, softcap) - 120usize];
    ["Offset of field: rksc_kv_scores_params::reserved"]
        [::core::mem::offset_of!(rksc_kv_scores_params, reserved) - 124usize];
};
impl Default for rksc_kv_scores_params {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct rksc_kv_compact_params {
    pub k_cache: *mut ::core::ffi::c_void,
    pub v_cache: *mut ::core::ffi::c_void,
    pub positions: *mut u32,
    pub blocks: *const u32,
    pub keep: *const u32,
    pub num_keep: u32,
    pub first_slot: u32,
    pub capacity: u32,
    pub num_kv_heads: u32,
    pub head_dim: u32,
    pub block_size: u32,
    pub dtype: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of rksc_kv_compact_params"][::core::mem::size_of::<rksc_kv_compact_params>() - 72usize];
    ["Alignment of rksc_kv_compact_params"][::core::mem::align_of::<rksc_kv_compact_params>() - 8usize];
    ["Offset of field: rksc_kv_compact_params::k_cache"]
        [::core::mem::offset_of!(rksc_kv_compact_params, k_cache) - 0usize];
    ["Offset of field: rksc_kv_compact_params::v_cache"]
        [::core::mem::offset_of!(rksc_kv_compact_params, v_cache) - 8usize];
    ["Offset of field: rksc_kv_compact_params::positions"]
        [::core::mem::offset_of!(rksc_kv_compact_params, positions) - 16usize];
    ["Offset of field: rksc_kv_compact_params::blocks"]
        [::core::mem::offset_of!(rksc_kv_compact_params, blocks) - 24usize];
    ["Offset of field: rksc_kv_compact_params::keep"][::core::mem::offset_of!(rksc_kv_compact_params, keep) - 32usize];
    ["Offset of field: rksc_kv_compact_params::num_keep"]
        [::core::mem::offset_of!(rksc_kv_compact_params, num_keep) - 40usize];
    ["Offset of field: rksc_kv_compact_params::first_slot"]
        [::core::mem::offset_of!(rksc_kv_compact_params, first_slot) - 44usize];
    ["Offset of field: rksc_kv_compact_params::capacity"]
        [::core::mem::offset_of!(rksc_kv_compact_params, capacity) - 48usize];
    ["Offset of field: rksc_kv_compact_params::num_kv_heads"]
        [::core::mem::offset_of!(rksc_kv_compact_params, num_kv_heads) - 52usize];
    ["Offset of field: rksc_kv_compact_params::head_dim"]
        [::core::mem::offset_of!(rksc_kv_compact_params, head_dim) - 56usize];
    ["Offset of field: rksc_kv_compact_params::block_size"]
        [::core::mem::offset_of!(rksc_kv_compact_params, block_size) - 60usize];
    ["Offset of field: rksc_kv_compact_params::dtype"]
        [::core::mem::offset_of!(rksc_kv_compact_params, dtype) - 64usize];
    ["Offset of field: rksc_kv_compact_params::reserved"]
        [::core::mem::offset_of!(rksc_kv_compact_params, reserved) - 68usize];
};
impl Default for rksc_kv_compact_params {
    fn default() -> Self {
        let mut s = ::core::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::core::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
unsafe extern "C" {
    pub fn rksc_embed(p: *const rksc_embed_params, stream: rksc_stream) -> i32;
    pub fn rksc_add_rms_norm(p: *const rksc_add_rms_norm_params, stream: rksc_stream) -> i32;
    pub fn rksc_exit_rows(p: *const rksc_exit_rows_params, stream: rksc_stream) -> i32;
    pub fn rksc_linear(p: *const rksc_linear_params, stream: rksc_stream) -> i32;
    pub fn rksc_linear_workspace_bytes(num_rows: u32, in_features: u32, out_features: u32) -> usize;
    pub fn rksc_linear_w4(p: *const rksc_linear_w4_params, stream: rksc_stream) -> i32;
    pub fn rksc_linear_w8(p: *const rksc_linear_w8_params, stream: rksc_stream) -> i32;
    pub fn rksc_gather_columns(p: *const rksc_gather_columns_params, stream: rksc_stream) -> i32;
    pub fn rksc_rope_append(p: *const rksc_rope_append_params, stream: rksc_stream) -> i32;
    pub fn rksc_kv_copy_blocks(p: *const rksc_kv_copy_blocks_params, stream: rksc_stream) -> i32;
    pub fn rksc_kv_transfer(p: *const rksc_kv_transfer_params, stream: rksc_stream) -> i32;
    pub fn rksc_paged_attention(p: *const rksc_paged_attention_params, stream: rksc_stream) -> i32;
    pub fn rksc_attention_mass(p: *const rksc_attention_mass_params, stream: rksc_stream) -> i32;
    pub fn rksc_glu(p: *const rksc_glu_params, stream: rksc_stream) -> i32;
    pub fn rksc_gather_rows(p: *const rksc_gather_rows_params, stream: rksc_stream) -> i32;
    pub fn rksc_softcap(p: *const rksc_softcap_params, stream: rksc_stream) -> i32;
    pub fn rksc_row_stats(p: *const rksc_row_stats_params, stream: rksc_stream) -> i32;
    pub fn rksc_row_stats_workspace_bytes(num_rows: u32, vocab: u32) -> usize;
    pub fn rksc_sample(p: *const rksc_sample_params, stream: rksc_stream) -> i32;
    pub fn rksc_entropy_probe(p: *const rksc_entropy_probe_params, stream: rksc_stream) -> i32;
    pub fn rksc_entropy_probe_workspace_bytes(num_rows: u32, hidden: u32, num_outputs: u32) -> usize;
    pub fn rksc_branch_similarity(p: *const rksc_branch_similarity_params, stream: rksc_stream) -> i32;
    pub fn rksc_branch_similarity_workspace_bytes(num_layers: u32, num_branches: u32) -> usize;
    pub fn rksc_kv_scores(p: *const rksc_kv_scores_params, stream: rksc_stream) -> i32;
    pub fn rksc_kv_scores_workspace_bytes(
        num_slots: u32,
        num_queries: u32,
        num_q_heads: u32,
        num_kv_heads: u32,
        head_dim: u32,
    ) -> usize;
    pub fn rksc_kv_compact(p: *const rksc_kv_compact_params, stream: rksc_stream) -> i32;
}

unsafe extern "C" {
    pub fn rksc_emu_embed(p: *const rksc_embed_params, stream: rksc_stream) -> i32;
    pub fn rksc_emu_add_rms_norm(p: *const rksc_add_rms_norm_params, stream: rksc_stream) -> i32;
    pub fn rksc_emu_exit_rows(p: *const rksc_exit_rows_params, stream: rksc_stream) -> i32;
    pub fn rksc_emu_linear(p: *const rksc_linear_params, stream: rksc_stream) -> i32;
    pub fn rksc_emu_linear_workspace_bytes(num_rows: u32, in_features: u32, out_features: u32) -> usize;
    pub fn rksc_emu_linear_w4(p: *const rksc_linear_w4_params, stream: rksc_stream) -> i32;
    pub fn rksc_emu_linear_w8(p: *const rksc_linear_w8_params, stream: rksc_stream) -> i32;
    pub fn rksc_emu_gather_columns(p: *const rksc_gather_columns_params, stream: rksc_stream) -> i32;
    pub fn rksc_emu_rope_append(p: *const rksc_rope_append_params, stream: rksc_stream) -> i32;
    pub fn rksc_emu_kv_copy_blocks(p: *const rksc_kv_copy_blocks_params, stream: rksc_stream) -> i32;
    pub fn rksc_emu_kv_transfer(p: *const rksc_kv_transfer_params, stream: rksc_stream) -> i32;
    pub fn rksc_emu_paged_attention(p: *const rksc_paged_attention_params, stream: rksc_stream) -> i32;
    pub fn rksc_emu_attention_mass(p: *const rksc_attention_mass_params, stream: rksc_stream) -> i32;
    pub fn rksc_emu_glu(p: *const rksc_glu_params, stream: rksc_stream) -> i32;
    pub fn rksc_emu_gather_rows(p: *const rksc_gather_rows_params, stream: rksc_stream) -> i32;
    pub fn rksc_emu_softcap(p: *const rksc_softcap_params, stream: rksc_stream) -> i32;
    pub fn rksc_emu_row_stats(p: *const rksc_row_stats_params, stream: rksc_stream) -> i32;
    pub fn rksc_emu_row_stats_workspace_bytes(num_rows: u32, vocab: u32) -> usize;
    pub fn rksc_emu_sample(p: *const rksc_sample_params, stream: rksc_stream) -> i32;
    pub fn rksc_emu_entropy_probe(p: *const rksc_entropy_probe_params, stream: rksc_stream) -> i32;
    pub fn rksc_emu_entropy_probe_workspace_bytes(num_rows: u32, hidden: u32, num_outputs: u32) -> usize;
    pub fn rksc_emu_branch_similarity(p: *const rksc_branch_similarity_params, stream: rksc_stream) -> i32;
    pub fn rksc_emu_branch_similarity_workspace_bytes(num_layers: u32, num_branches: u32) -> usize;
    pub fn rksc_emu_kv_scores(p: *const rksc_kv_scores_params, stream: rksc_stream) -> i32;
    pub fn rksc_emu_kv_scores_workspace_bytes(
        num_slots: u32,
        num_queries: u32,
        num_q_heads: u32,
        num_kv_heads: u32,
        head_dim: u32,
    ) -> usize;
    pub fn rksc_emu_kv_compact(p: *const rksc_kv_compact_params, stream: rksc_stream) -> i32;
    pub fn rksc_emu_version() -> u32;
    pub fn rksc_emu_register(p: *const ::core::ffi::c_void, bytes: usize, read_only: i32) -> i32;
    pub fn rksc_emu_unregister(p: *const ::core::ffi::c_void) -> i32;
    pub fn rksc_emu_set_order(order: i32, seed: u64) -> i32;
    pub fn rksc_emu_last_fault() -> *const ::core::ffi::c_char;
    pub fn rksc_emu_clear_fault();
    pub fn rksc_emu_fault_rows(n: i32) -> i32;
    pub fn rksc_emu_fault_row_sum(n: i32) -> i32;
    pub fn rksc_emu_fault_reverse(n: i32) -> i32;
    pub fn rksc_emu_fault_rounds(n: i32) -> i32;
    pub fn rksc_emu_fault_pipeline(n: i32) -> i32;
    pub fn rksc_emu_fault_split_sum(n: i32) -> i32;
    pub fn rksc_emu_fault_product(n: i32) -> i32;
}
