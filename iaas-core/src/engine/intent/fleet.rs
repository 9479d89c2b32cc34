//! The operator's machines and catalog.

use super::create::Creatable;
use crate::Error;
use crate::Id;
use crate::Result;
use crate::engine::draft::Draft;
use crate::model::*;
use crate::security::actions::Create;

impl Creatable for Region {
    const OWNERS: &'static [&'static str] = &["cloud"];
    fn decide(_: &mut Draft<'_>, _: Id<Self>, _: &Create<Self>) -> Result<Empty> {
        Ok(Empty {})
    }
}

impl Creatable for Zone {
    const OWNERS: &'static [&'static str] = &["cloud"];
    fn decide(draft: &mut Draft<'_>, _: Id<Self>, request: &Create<Self>) -> Result<Empty> {
        draft.present(request.spec.region)?;
        draft.depend(request.spec.region);
        Ok(Empty {})
    }
}

impl Creatable for Host {
    const OWNERS: &'static [&'static str] = &["cloud"];
    fn decide(draft: &mut Draft<'_>, _: Id<Self>, request: &Create<Self>) -> Result<Empty> {
        draft.present(request.spec.zone)?;
        draft.depend(request.spec.zone);
        if request.spec.vcpus == 0 || request.spec.memory == 0 {
            return Err(Error::invalid("a host without vCPUs or memory runs nothing").remedy("give both"));
        }
        Ok(Empty {})
    }
}

impl Creatable for InstanceType {
    const OWNERS: &'static [&'static str] = &["cloud"];
    fn decide(_: &mut Draft<'_>, _: Id<Self>, _: &Create<Self>) -> Result<Empty> {
        Ok(Empty {})
    }
}

impl Creatable for Image {
    const OWNERS: &'static [&'static str] = &["cloud", "organization", "project"];
    fn decide(_: &mut Draft<'_>, _: Id<Self>, request: &Create<Self>) -> Result<Empty> {
        let ImageSpec::Kernel { cmdline, .. } = &request.spec;
        check_cmdline(cmdline).map(|()| Empty {})
    }
}

/// A kernel takes 2047 bytes; a line break or NUL would end them early.
pub(super) fn check_cmdline(text: &str) -> Result<()> {
    if text.len() > 2047 || text.bytes().any(|b| !(0x20..0x7f).contains(&b)) {
        return Err(Error::invalid("this is not a kernel command line")
            .remedy("use at most 2047 bytes of printable ASCII on one line"));
    }
    Ok(())
}

impl Creatable for KeyPair {
    const OWNERS: &'static [&'static str] = &["project"];
    fn decide(_: &mut Draft<'_>, _: Id<Self>, _: &Create<Self>) -> Result<Empty> {
        Ok(Empty {})
    }
}
