# Completion of convertd(8) for bash. A test holds it to what the program takes.

_convertd() {
  local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
  case $previous in
    --policy | --socket) mapfile -t COMPREPLY < <(compgen -f -- "$current") ;;
    *)
      mapfile -t COMPREPLY < <(compgen -W \
        "check unit-dropin --help --policy --socket --verbose --version" -- "$current")
      ;;
  esac
}
complete -o filenames -F _convertd convertd
