//! What CPUID answers: the host's own features as far as KVM can give them, with the guest's own topology.

use kvm_bindings::CpuId;
use kvm_bindings::kvm_cpuid_entry2;

/// Turns what KVM supports into what processor `index` of `count` shows: one package, one thread per core.
///
/// # Source
/// Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E.
pub(super) fn shape(cpuid: &mut CpuId, index: u8, count: u8, deadline_timer: bool) {
    let (id, count) = (u32::from(index), u32::from(count));
    for entry in cpuid.as_mut_slice() {
        shape_entry(entry, id, count, deadline_timer);
    }
}

fn shape_entry(entry: &mut kvm_cpuid_entry2, id: u32, count: u32, deadline_timer: bool) {
    // Bits of an APIC id that tell cores apart.
    let width = count.next_power_of_two().trailing_zeros();
    match (entry.function, entry.index) {
        (1, _) => {
            entry.ebx = entry.ebx & 0xffff | (count.next_power_of_two() & 0xff) << 16 | id << 24;
            entry.ecx |= HYPERVISOR | if deadline_timer { TSC_DEADLINE } else { 0 };
            entry.edx = entry.edx & !HYPER_THREADS | if count > 1 { HYPER_THREADS } else { 0 };
        }
        // Cores that share this cache, and cores of the package.
        (4, _) if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { count.next_power_of_two() - 1 } else { 0 };
            let cores = count.next_power_of_two() - 1;
            entry.eax = entry.eax & 0x3fff | sharing << 14 | cores << 26;
        }
        (0xb | 0x1f, 0) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 1, THREAD_LEVEL, id),
        (0xb | 0x1f, 1) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (width, count, CORE_LEVEL, id);
        }
        (0xb | 0x1f, level) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, level & 0xff, id),
        (0x8000_0008, _) => entry.ecx = width << 12 | (count - 1),
        (0x8000_001e, _) => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
}

const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPER_THREADS: u32 = 1 << 28;
const THREAD_LEVEL: u32 = 1 << 8;
const CORE_LEVEL: u32 = 1 | 2 << 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_processor_has_its_own_number() {
        let leaf = |function, index| kvm_cpuid_entry2 { function, index, ..Default::default() };
        let mut cpuid = CpuId::from_entries(&[leaf(1, 0), leaf(0xb, 0), leaf(0xb, 1)]).unwrap();
        shape(&mut cpuid, 2, 3, true);
        let [one, threads, cores] = cpuid.as_slice() else { panic!("three leaves") };
        // Three cores need the numbers of four.
        assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff), (2, 4));
        assert_eq!(one.ecx, HYPERVISOR | TSC_DEADLINE);
        assert_eq!((threads.ebx, threads.edx), (1, 2));
        assert_eq!((cores.eax, cores.ebx, cores.edx), (2, 3, 2));
    }
}
