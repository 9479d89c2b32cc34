#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| iaas_vmm::fuzz::rng(input));
