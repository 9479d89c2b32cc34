//! From a [`Target`] to an open device in a role: the opener is found by scheme and version, stage one runs in control,
//! and what it opened crosses as a [`Parcel`] beside its descriptors.
//!
//! ```text
//! control:  Roles::prepare_block(target) ─▶ (Parcel, NamedFds) ─▶ spawn or call
//! role:     Roles::open_block(target, parcel, fds, key, env)   ─▶ BlockDevice
//! ```
//! Both halves see only the form that was chosen. `prepare` may block on files; call it where that is allowed.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::Deserialize;
use serde::Serialize;
use uuid::Uuid;

use super::NamedFds;
use super::Roles;
use crate::Error;
use crate::Result;
use crate::spi::dataplane::BlockDevice;
use crate::spi::dataplane::Env;
use crate::spi::dataplane::FramePort;
use crate::spi::dataplane::Grant;
use crate::spi::dataplane::Needs;
use crate::spi::dataplane::opener::Key;
use crate::spi::target::Form;
use crate::spi::target::Target;

/// A [`Grant`] on its way into a role: everything but the descriptors, which travel beside it under names of their own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parcel {
    /// The target that it opens.
    pub target: Uuid,
    /// The scheme of the opener that was chosen.
    pub scheme: String,
    /// The version of its tokens.
    pub version: u16,
    /// The names of the grant's files.
    #[serde(default)]
    pub fds: Vec<String>,
    /// For each of the grant's folders, whether it may be written.
    #[serde(default)]
    pub dirs: Vec<bool>,
    /// What the jail must allow.
    #[serde(default)]
    pub needs: Needs,
}

impl Parcel {
    fn pack(target: Uuid, (scheme, version): (&str, u16), grant: Grant) -> (Self, NamedFds) {
        let mut parcel = Self {
            target,
            scheme: scheme.to_owned(),
            version,
            fds: Vec::new(),
            dirs: Vec::new(),
            needs: grant.needs,
        };
        let mut sent = NamedFds::new();
        for (name, fd) in grant.fds {
            sent.push((parcel.file(&name), fd));
            parcel.fds.push(name);
        }
        for (number, (fd, writable)) in grant.dirs.into_iter().enumerate() {
            sent.push((parcel.dir(number), fd));
            parcel.dirs.push(writable);
        }
        (parcel, sent)
    }

    /// Takes the parcel's descriptors out of `fds` and gives the grant back.
    ///
    /// # Errors
    /// `Invalid`: a descriptor is missing; those that were there are closed.
    pub fn unpack(&self, fds: &mut BTreeMap<String, OwnedFd>) -> Result<Grant> {
        let mut take = |name: String| {
            fds.remove(&name).ok_or_else(|| {
                Error::invalid(format!(
                    "the {} `{}` came without all its descriptors",
                    self.scheme, self.target
                ))
                .detail(name)
            })
        };
        let mut grant = Grant { needs: self.needs, ..Grant::default() };
        for name in &self.fds {
            grant.fds.insert(name.clone(), take(self.file(name))?);
        }
        for (number, writable) in self.dirs.iter().enumerate() {
            grant.dirs.push((take(self.dir(number))?, *writable));
        }
        Ok(grant)
    }

    fn file(&self, name: &str) -> String {
        format!("{}/fd/{name}", self.target)
    }

    fn dir(&self, number: usize) -> String {
        format!("{}/dir/{number}", self.target)
    }
}

impl Roles {
    /// Stage one for a volume, in control: the first form of `target` that an opener knows.
    ///
    /// # Errors
    /// `Unsupported`: no opener knows any of its forms. Else what the opener says.
    pub fn prepare_block(&self, target: &Target) -> Result<(Parcel, NamedFds)> {
        let chosen = choose(&self.block, |o| o.scheme(), target)?;
        Ok(Parcel::pack(target.id, chosen.scheme, chosen.opener.prepare(&chosen.target)?))
    }

    /// Stage two for a volume, in the role: by the opener that prepared it.
    ///
    /// # Errors
    /// `Unsupported`: this binary has no such opener. `Invalid`: the parcel is of another target or lacks a descriptor. Else
    /// what the opener says.
    pub fn open_block(
        &self,
        target: &Target,
        parcel: &Parcel,
        fds: &mut BTreeMap<String, OwnedFd>,
        key: Option<Key>,
        env: &Env,
    ) -> Result<Box<dyn BlockDevice>> {
        let chosen = find(&self.block, |o| o.scheme(), target, parcel)?;
        chosen.opener.open(&chosen.target, parcel.unpack(fds)?, key, env)
    }

    /// Stage one for a port, in control.
    ///
    /// # Errors
    /// As [`prepare_block`](Self::prepare_block).
    pub fn prepare_port(&self, target: &Target) -> Result<(Parcel, NamedFds)> {
        let chosen = choose(&self.port, |o| o.scheme(), target)?;
        Ok(Parcel::pack(target.id, chosen.scheme, chosen.opener.prepare(&chosen.target)?))
    }

    /// Stage two for a port, in the role.
    ///
    /// # Errors
    /// As [`open_block`](Self::open_block).
    pub fn open_port(
        &self,
        target: &Target,
        parcel: &Parcel,
        fds: &mut BTreeMap<String, OwnedFd>,
        env: &Env,
    ) -> Result<Vec<Box<dyn FramePort>>> {
        let chosen = find(&self.port, |o| o.scheme(), target, parcel)?;
        chosen.opener.open(&chosen.target, parcel.unpack(fds)?, env)
    }

    /// The schemes and versions of the volume openers, for what a hypervisor says that it accepts.
    pub fn block_schemes(&self) -> Vec<(String, u16)> {
        self.block.iter().map(|o| o.scheme()).map(|(name, version)| (name.to_owned(), version)).collect()
    }

    /// The schemes and versions of the port openers.
    pub fn port_schemes(&self) -> Vec<(String, u16)> {
        self.port.iter().map(|o| o.scheme()).map(|(name, version)| (name.to_owned(), version)).collect()
    }
}

/// An opener, and the target with the one form that it knows.
struct Chosen<'a, O: ?Sized> {
    opener: &'a O,
    scheme: (&'static str, u16),
    target: Target,
}

/// The first form, in the target's order, that one of `openers` knows.
fn choose<'a, O: ?Sized>(
    openers: &'a [Arc<O>],
    scheme: impl Fn(&O) -> (&'static str, u16),
    target: &Target,
) -> Result<Chosen<'a, O>> {
    let known = |form: &Form| openers.iter().find(|opener| is_of(form, scheme(opener)));
    let found = target.forms.iter().find_map(|form| Some((known(form)?, form)));
    let (opener, form) = found.ok_or_else(|| {
        let has: Vec<String> =
            openers.iter().map(|o| scheme(o)).map(|(name, v)| format!("{name} {v}")).collect();
        let wants: Vec<String> = target.forms.iter().map(describe).collect();
        Error::unsupported(format!("no opener here knows how to open {}", target.id))
            .detail(format!("its forms: [{}]; the openers: [{}]", wants.join(", "), has.join(", ")))
            .remedy("give the provider's opener to `Roles` in the binary of the role")
    })?;
    Ok(Chosen {
        opener,
        scheme: scheme(opener),
        target: Target { forms: vec![form.clone()], ..target.clone() },
    })
}

/// The opener that made `parcel`, with the form that it knows.
fn find<'a, O: ?Sized>(
    openers: &'a [Arc<O>],
    scheme: impl Fn(&O) -> (&'static str, u16),
    target: &Target,
    parcel: &Parcel,
) -> Result<Chosen<'a, O>> {
    if parcel.target != target.id {
        return Err(Error::invalid(format!("{} was prepared for another target", target.id)));
    }
    let is_it = |form: &&Form| is_of(form, (&parcel.scheme, parcel.version));
    let forms = target.forms.iter().find(is_it).cloned().into_iter().collect();
    choose(openers, scheme, &Target { forms, ..target.clone() })
}

fn is_of(form: &Form, of: (&str, u16)) -> bool {
    matches!(form, Form::Opener { scheme, version, .. } if (scheme.as_str(), *version) == of)
}

/// What a form is, without its token.
fn describe(form: &Form) -> String {
    match form {
        Form::Opener { scheme, version, .. } => format!("{scheme} {version}"),
        Form::RawFile(_) => "raw file".to_owned(),
        Form::BlockNode(_) => "block device".to_owned(),
        Form::VhostUser(_) => "vhost-user".to_owned(),
        Form::Tap(_) => "TAP".to_owned(),
        Form::Vfio(_) => "VFIO".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::io::Seek;
    use std::io::Write;
    use std::sync::Mutex;

    use bytes::Bytes;

    use super::*;
    use crate::ErrorKind;
    use crate::Term;
    use crate::spi::dataplane::PortOpener;
    use crate::spi::target::Mode;

    /// Opens a file with its token in it, and notes what it was given in stage two.
    #[derive(Clone, Debug)]
    struct Noting(&'static str, u16, Arc<Mutex<Vec<String>>>);

    impl Noting {
        fn new(scheme: &'static str, version: u16) -> Self {
            Self(scheme, version, Arc::default())
        }
    }

    impl PortOpener for Noting {
        fn scheme(&self) -> (&'static str, u16) {
            (self.0, self.1)
        }

        fn prepare(&self, target: &Target) -> Result<Grant> {
            let [Form::Opener { token, .. }] = target.forms.as_slice() else {
                panic!("one form: {target:?}")
            };
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(token).unwrap();
            Ok(Grant {
                fds: [("token".to_owned(), file.into())].into(),
                dirs: vec![(File::open("/").unwrap().into(), false), (File::open("/").unwrap().into(), true)],
                needs: Needs { io_uring: true, threads: 3, ..Needs::default() },
            })
        }

        fn open(&self, target: &Target, mut grant: Grant, _env: &Env) -> Result<Vec<Box<dyn FramePort>>> {
            assert_eq!(target.forms.len(), 1);
            let mut file = File::from(grant.fds.remove("token").unwrap());
            let mut token = String::new();
            file.rewind().unwrap();
            file.read_to_string(&mut token).unwrap();
            let writable: Vec<bool> = grant.dirs.iter().map(|(_, writable)| *writable).collect();
            self.2.lock().unwrap().push(format!("{token} {writable:?} {:?}", grant.needs));
            Ok(Vec::new())
        }
    }

    fn target(forms: &[(&str, u16)]) -> Target {
        let form = |(scheme, version): &(&str, u16)| Form::Opener {
            scheme: (*scheme).to_owned(),
            version: *version,
            token: Bytes::from(format!("{scheme}-{version}")),
        };
        let mut forms: Vec<Form> = forms.iter().map(form).collect();
        forms.insert(0, Form::Tap("tap0".to_owned()));
        Target { id: Uuid::from_u128(7), term: Term(1), mode: Mode::Write, forms, key: None }
    }

    fn through_the_wire(parcel: &Parcel) -> Parcel {
        super::super::frame::decode(&super::super::frame::encode(parcel).unwrap()).unwrap()
    }

    #[test]
    fn the_best_known_form_is_opened_in_the_role_with_what_was_granted_in_control() {
        let (one, two) = (Noting::new("ring", 1), Noting::new("ring", 2));
        let roles = Roles::new().with_port(one.clone()).with_port(two.clone());
        let target = target(&[("ring", 3), ("ring", 2), ("ring", 1)]);
        let (parcel, fds) = roles.prepare_port(&target).unwrap();
        assert_eq!((parcel.scheme.as_str(), parcel.version, fds.len()), ("ring", 2, 3));
        let mut fds: BTreeMap<_, _> = fds.into_iter().collect();
        fds.insert("another's".to_owned(), File::open("/dev/null").unwrap().into());
        let env = Env::default();
        roles.open_port(&target, &through_the_wire(&parcel), &mut fds, &env).unwrap();
        let needs = Needs { io_uring: true, threads: 3, ..Needs::default() };
        assert_eq!(*two.2.lock().unwrap(), [format!("ring-2 [false, true] {needs:?}")]);
        assert!(one.2.lock().unwrap().is_empty());
        assert_eq!(fds.into_keys().collect::<Vec<_>>(), ["another's"]);
    }

    #[test]
    fn an_unknown_form_a_strange_parcel_and_a_lost_descriptor_are_told_apart() {
        let roles = Roles::new().with_port(Noting::new("ring", 1));
        let unknown = roles.prepare_port(&target(&[("ring", 2)])).unwrap_err();
        assert_eq!(unknown.kind(), ErrorKind::Unsupported);
        assert!(unknown.operator()[0].contains("[TAP, ring 2]"), "{unknown:#}");
        assert_eq!(roles.prepare_block(&target(&[("ring", 1)])).unwrap_err().kind(), ErrorKind::Unsupported);

        let target = target(&[("ring", 1)]);
        let (parcel, fds) = roles.prepare_port(&target).unwrap();
        let open = |roles: &Roles, parcel: &Parcel| {
            roles.open_port(&target, parcel, &mut BTreeMap::new(), &Env::default()).unwrap_err().kind()
        };
        assert_eq!(open(&roles, &parcel), ErrorKind::Invalid);
        let strange = Parcel { target: Uuid::nil(), fds: Vec::new(), dirs: Vec::new(), ..parcel.clone() };
        assert_eq!(open(&roles, &strange), ErrorKind::Invalid);
        assert_eq!(open(&Roles::new(), &parcel), ErrorKind::Unsupported);
        assert_eq!(open(&roles, &Parcel { version: 9, ..parcel.clone() }), ErrorKind::Unsupported);
        drop(fds);
    }
}
