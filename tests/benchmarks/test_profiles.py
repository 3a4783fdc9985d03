import pytest

from benchmarks.profiles import Kernel, attribute, describe, kernel_class


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "GEMM"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "norm"),
        ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel", "norm"),
        ("triton_poi_fused_mul_silu_split_1", "activation"),
        ("triton_red_fused__to_copy_amax_exp_sub_sum_0", "loss"),
        ("void multi_tensor_apply_kernel<AdamFunctorMaster<...>>", "optimizer"),
        ("void fused_rope_forward_kernel<__nv_bfloat16>", "rotary"),
        ("Memset (Device)", "copies"),
        ("something_else", "other"),
    ],
)
def test_kernels_are_known_by_name(name: str, expected: str) -> None:
    assert kernel_class(name) == expected


def test_classes_and_idle_add_up_to_the_step() -> None:
    kernels = [
        Kernel("gemm", 1000, 3000),
        Kernel("ncclAllGather", 2000, 5000),  # 1 ms of it beside the product
        Kernel("silu", 2500, 2600),  # hidden
        Kernel("rms_norm", 7000, 8000),
    ]
    spent, whole = attribute(list(reversed(kernels)))
    assert spent == {"GEMM": 2.0, "communication": 2.0, "idle": 2.0, "norm": 1.0}
    assert whole == sum(spent.values()) == 7.0
    assert "communication" in describe("ours", kernels)
